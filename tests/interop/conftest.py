"""Fixtures: a node with directories of its own, its kubelet, and the vineyard servers to compare."""

import itertools
import os
import shutil
from pathlib import Path

import pytest

import harness

_numbers = itertools.count(1)


def pytest_configure(config):
    if "VINELET_BASE" not in os.environ:
        pytest.exit("these tests mount and kill: start them as `tests/run`, or as "
                    "`tests/interop/sandbox tests/.cache/venv/bin/pytest tests/interop`", 2)


@pytest.hookimpl(tryfirst=True, hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    # The log of a failing agent belongs to the failure.
    for node in getattr(item, "vinelet_nodes", []):
        if report.when == "call" and report.failed and node.log.exists():
            report.sections.append((f"log of the agent in {node.root}", node.log_text()[-6000:]))


@pytest.fixture
def make_node(request):
    """Makes nodes; at the end everything of theirs is ended."""
    request.node.vinelet_nodes = nodes = []

    def make(base=None):
        node = harness.Node(Path(base or os.environ["VINELET_BASE"]) / f"n{next(_numbers)}")
        nodes.append(node)
        return node

    yield make
    for node in nodes:
        node.close()


@pytest.fixture
def node(make_node):
    return make_node()


@pytest.fixture
def kubelet(node):
    from kubelet import Kubelet

    return Kubelet(node)


@pytest.fixture
def scratch():
    directory = Path(os.environ["VINELET_BASE"]) / f"s{next(_numbers)}"
    directory.mkdir()
    yield directory
    shutil.rmtree(directory, ignore_errors=True)
