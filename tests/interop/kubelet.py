"""What kubelet does to a CSI driver: its calls, their shapes, their order, and what it expects.

Recorded from kubelet 1.36: a fresh connection for every call, `:authority` `localhost` on the CSI
socket and a percent-encoded path on the registration socket, the parent of the target made by
kubelet, the target itself by the driver.
"""

import hashlib
import json
import os
import sys
import uuid
from pathlib import Path

import grpc

from harness import CACHE, DRIVER, eventually, is_socket

sys.path.insert(0, str(CACHE / "stubs"))

import api_pb2 as registration  # noqa: E402
import api_pb2_grpc as registration_grpc  # noqa: E402
import csi_pb2 as csi  # noqa: E402
import csi_pb2_grpc as csi_grpc  # noqa: E402

Mode = csi.VolumeCapability.AccessMode
Capability = csi.NodeServiceCapability.RPC

#: Seconds kubelet gives each call.
OPERATION, GET_INFO, NOTIFY = 120.0, 1.0, 5.0


def connection(path, authority="localhost"):
    """A connection of its own to a UNIX socket."""
    options = [("grpc.default_authority", authority), ("grpc.use_local_subchannel_pool", 1),
               ("grpc.enable_retries", 0)]
    return grpc.insecure_channel(f"unix:{path}", options=options)


def call(path, method, request, timeout=OPERATION):
    """One CSI call on a connection of its own, as kubelet makes it."""
    service = "Node" if method.startswith("Node") else "Identity"
    with connection(path) as channel:
        stub = getattr(csi_grpc, f"{service}Stub")(channel)
        return getattr(stub, method)(request, timeout=timeout)


def mount_capability(mode=Mode.MULTI_NODE_READER_ONLY, fs_type="", mount_flags=()):
    return csi.VolumeCapability(
        mount=csi.VolumeCapability.MountVolume(fs_type=fs_type, mount_flags=mount_flags),
        access_mode=csi.VolumeCapability.AccessMode(mode=mode),
    )


class Published:
    """A volume in a pod's directory."""

    def __init__(self, volume_id, target):
        self.volume_id, self.target = volume_id, target


class Kubelet:
    """The kubelet of a `harness.Node`."""

    def __init__(self, node):
        self.node = node
        self.endpoint = str(node.csi_socket)

    # registration

    def register(self, socket=None, accept=True, error=""):
        """kubelet's plugin manager on a new socket: GetInfo, NodeGetInfo, NotifyRegistrationStatus."""
        socket = socket or self.node.registration_socket
        eventually(lambda: is_socket(socket), what=f"a registration socket at {socket}")
        authority = "/var/lib/kubelet/plugins_registry/" + socket.name
        with connection(socket, authority.replace("/", "%2F")) as channel:
            stub = registration_grpc.RegistrationStub(channel)
            info = stub.GetInfo(registration.InfoRequest(), timeout=GET_INFO)
        node_info = None
        if accept:
            self.endpoint = info.endpoint.removeprefix("unix://")
            node_info = call(self.endpoint, "NodeGetInfo", csi.NodeGetInfoRequest())
        with connection(socket, authority.replace("/", "%2F")) as channel:
            stub = registration_grpc.RegistrationStub(channel)
            status = registration.RegistrationStatus(plugin_registered=accept, error=error)
            stub.NotifyRegistrationStatus(status, timeout=NOTIFY)
        return info, node_info

    # volumes

    def capabilities(self):
        reply = call(self.endpoint, "NodeGetCapabilities", csi.NodeGetCapabilitiesRequest())
        return {capability.rpc.type for capability in reply.capabilities}

    def _target(self, pod_uid, volume):
        parent = self.node.kubelet / "pods" / pod_uid / "volumes" / "kubernetes.io~csi" / volume
        parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        return parent / "mount"

    def _write_volume_data(self, target, **data):
        (target.parent / "vol_data.json").write_text(json.dumps({"driverName": DRIVER, **data}))

    @staticmethod
    def pod_info(namespace, pod_uid, ephemeral, name="task"):
        """What `podInfoOnMount: true` adds to the volume context."""
        return {
            "csi.storage.k8s.io/ephemeral": ephemeral,
            "csi.storage.k8s.io/pod.name": name,
            "csi.storage.k8s.io/pod.namespace": namespace,
            "csi.storage.k8s.io/pod.uid": pod_uid,
            "csi.storage.k8s.io/serviceAccount.name": "default",
        }

    @staticmethod
    def fluid_context(runtime, **more):
        """The volumeAttributes of the PV that fluid makes for a vineyard runtime."""
        return {
            "fluid_path": str(runtime.fluid_path),
            "mount_type": "vineyard-fuse",
            "runtime_name": runtime.name,
            "runtime_namespace": runtime.namespace,
            "mount_pod_node_selector_key": f"fluid.io/f-{runtime.namespace}-{runtime.name}",
            "node_publish_method": "symlink",
            **more,
        }

    def pv_request(self, runtime, pod_uid=None, context=None, readonly=False,
                   mode=Mode.MULTI_NODE_READER_ONLY, pod_namespace=None, volume_id=None):
        """The publish of a PV: volume_id is its volumeHandle."""
        pod_uid = pod_uid or str(uuid.uuid4())
        name = volume_id or f"{runtime.namespace}-{runtime.name}"
        context = self.fluid_context(runtime) if context is None else context
        return csi.NodePublishVolumeRequest(
            volume_id=name,
            target_path=str(self._target(pod_uid, name)),
            volume_capability=mount_capability(mode),
            readonly=readonly,
            volume_context={
                **context, **self.pod_info(pod_namespace or runtime.namespace, pod_uid, "false")
            },
        )

    def inline_request(self, pod_namespace, context, pod_uid=None, volume="cache"):
        """The publish of an ephemeral inline volume: its id is born with the pod."""
        pod_uid = pod_uid or str(uuid.uuid4())
        return csi.NodePublishVolumeRequest(
            volume_id="csi-" + hashlib.sha256((pod_uid + volume).encode()).hexdigest(),
            target_path=str(self._target(pod_uid, volume)),
            volume_capability=mount_capability(Mode.SINGLE_NODE_WRITER),
            readonly=True,
            volume_context={**context, **self.pod_info(pod_namespace, pod_uid, "true")},
        )

    def publish(self, request, timeout=OPERATION):
        """NodeGetCapabilities as often as kubelet asks, then NodePublishVolume."""
        target = Path(request.target_path)
        self._write_volume_data(target, volumeHandle=request.volume_id)
        for _ in range(2):
            self.capabilities()
        call(self.endpoint, "NodePublishVolume", request, timeout)
        return Published(request.volume_id, target)

    def publish_pv(self, runtime, **details):
        return self.publish(self.pv_request(runtime, **details))

    def publish_inline(self, pod_namespace, context, **details):
        return self.publish(self.inline_request(pod_namespace, context, **details))

    def unpublish(self, published):
        """NodeUnpublishVolume and kubelet's own cleaning: it removes nothing that is not empty."""
        request = csi.NodeUnpublishVolumeRequest(
            volume_id=published.volume_id, target_path=str(published.target))
        call(self.endpoint, "NodeUnpublishVolume", request)
        assert not os.path.lexists(published.target), f"{published.target} is still there"
        (published.target.parent / "vol_data.json").unlink(missing_ok=True)
        published.target.parent.rmdir()

    def stats(self, published):
        request = csi.NodeGetVolumeStatsRequest(
            volume_id=published.volume_id, volume_path=str(published.target))
        return call(self.endpoint, "NodeGetVolumeStats", request)


def error_of(function, *arguments, **keywords):
    """(code name, message) of the gRPC error that a call ends with."""
    try:
        reply = function(*arguments, **keywords)
    except grpc.RpcError as error:
        assert error.details(), f"{error.code().name} without a message"
        return error.code().name, error.details()
    raise AssertionError(f"it worked: {reply!r}")
