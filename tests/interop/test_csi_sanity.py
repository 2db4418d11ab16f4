"""csi-sanity over Identity and Node, through a test-only controller in front of the unchanged driver."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest

import harness
from harness import CSI_SANITY, eventually, is_socket
from kubelet import Capability, Kubelet

#: Specs of capabilities that a node plugin may do without, by the first words of their names.
OPTIONAL = {
    "Node Service NodeStageVolume": "STAGE_UNSTAGE_VOLUME",
    "Node Service NodeUnstageVolume": "STAGE_UNSTAGE_VOLUME",
    "Node Service NodeGetVolumeStats": "GET_VOLUME_STATS",
    "Node Service NodeExpandVolume": "EXPAND_VOLUME",
    "Node Service NodePublishVolume with single node multi writer capability": "SINGLE_NODE_MULTI_WRITER",
    "Node Service NodeGetVolumeHealth": "GET_VOLUME_HEALTH",
    "Node Service NodeGetStorageHealth": "GET_STORAGE_HEALTH",
}

FOCUS = "Identity Service|Node Service"


def _names():
    """The specs that csi-sanity has, asked of itself."""
    if not CSI_SANITY.exists():
        return ["csi-sanity is there"]
    report = Path(harness.os.environ["VINELET_BASE"]) / "dry.xml"
    subprocess.run(
        [CSI_SANITY, "--csi.endpoint=/none.sock", "--ginkgo.dry-run", f"--ginkgo.focus={FOCUS}",
         f"--ginkgo.junit-report={report}"], stdout=subprocess.DEVNULL, timeout=60, check=True)
    return [name for name, outcome, _ in _specs(report) if outcome == "passed"]


def _specs(report):
    """(name, status, text) of each spec in a JUnit report."""
    for case in xml.parse(report).iter("testcase"):
        name = re.sub(r"^\[It\] ", "", case.get("name"))
        text = "\n".join(e.text or e.get("message", "") for e in case if e.tag in ("failure", "error", "skipped"))
        if re.match(FOCUS, name):
            yield name, case.get("status"), text


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """One run of csi-sanity: name -> (status, text), and the node capabilities of the driver."""
    assert CSI_SANITY.exists(), "csi-sanity could not be built: is there Go?"
    base = Path(harness.os.environ["VINELET_BASE"]) / "sanity"
    base.mkdir()
    node = harness.Node(base / "n")
    kubelet = Kubelet(node)
    proxy = None
    try:
        node.add_runtime()
        node.start()
        kubelet.register()
        capabilities = {Capability.Type.Name(c) for c in kubelet.capabilities()}
        context = json.dumps({"runtimeName": "vineyard", "runtimeNamespace": "default"})
        front = base / "front.sock"
        proxy = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("sanity_proxy.py")), str(front), str(node.csi_socket), context],
            stdin=subprocess.PIPE)
        eventually(lambda: is_socket(front), what="the test-only controller listens")
        report = base / "junit.xml"
        log = subprocess.run(
            [CSI_SANITY, f"--csi.endpoint={front}", f"--csi.mountdir={node.kubelet}/pods/sanity",
             f"--csi.stagingdir={node.kubelet}/plugins/sanity", f"--ginkgo.focus={FOCUS}",
             f"--ginkgo.junit-report={report}", "--ginkgo.no-color"],
            capture_output=True, text=True, timeout=300)
        assert report.exists(), log.stdout[-3000:] + log.stderr[-3000:]
        proxy.stdin.close()
        proxy.wait(10)
        yield {name: (status, text) for name, status, text in _specs(report)}, capabilities
        node.stop()
        assert node.leftovers() == []
    finally:
        if proxy and proxy.poll() is None:
            proxy.kill()
        node.close()


@pytest.mark.parametrize("spec", _names())
def test_spec(outcomes, spec):
    results, capabilities = outcomes
    status, text = results[spec]
    needs = next((need for prefix, need in OPTIONAL.items() if spec.startswith(prefix)), None)
    if status == "skipped" and needs and needs not in capabilities:
        pytest.skip(f"the driver does not advertise {needs}")
    assert status == "passed", text


def test_every_spec_of_a_capability_that_is_advertised_ran(outcomes):
    results, _ = outcomes
    assert len(results) >= 27
    assert sum(status == "passed" for status, _ in results.values()) >= 12
