"""A test-only controller in front of an unchanged driver, for csi-sanity.

    sanity_proxy.py LISTEN DRIVER CONTEXT_JSON

Identity and Node calls go through byte by byte, answers and errors too. Added is what csi-sanity
needs before it runs its Node specs at all: CONTROLLER_SERVICE among the plugin's capabilities, and a
controller that makes up volumes and gives them the volume context of the command line.
"""

import json
import sys
from concurrent import futures

import grpc

import kubelet
from kubelet import csi

listen, driver, context = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
CAPABILITIES = "/csi.v1.Identity/GetPluginCapabilities"


def forward(method):
    def handle(request, servicer_context):
        with kubelet.connection(driver) as channel:
            try:
                # A caller without a deadline has one that no clock can hold.
                timeout = min(servicer_context.time_remaining(), 120)
                reply = channel.unary_unary(method)(request, timeout=timeout)
            except grpc.RpcError as error:
                servicer_context.abort(error.code(), error.details())
        if method == CAPABILITIES:
            capabilities = csi.GetPluginCapabilitiesResponse.FromString(reply)
            service = csi.PluginCapability.Service(type=csi.PluginCapability.Service.CONTROLLER_SERVICE)
            capabilities.capabilities.append(csi.PluginCapability(service=service))
            reply = capabilities.SerializeToString()
        return reply

    return handle


class Controller:
    """Volumes that exist by name alone."""

    def __init__(self):
        self.volumes = {}

    def ControllerGetCapabilities(self, data, _):
        rpc = csi.ControllerServiceCapability.RPC(type=csi.ControllerServiceCapability.RPC.CREATE_DELETE_VOLUME)
        capability = csi.ControllerServiceCapability(rpc=rpc)
        return csi.ControllerGetCapabilitiesResponse(capabilities=[capability])

    def CreateVolume(self, data, servicer_context):
        request = csi.CreateVolumeRequest.FromString(data)
        if not request.name or not request.volume_capabilities:
            servicer_context.abort(grpc.StatusCode.INVALID_ARGUMENT, "name and volume_capabilities are required")
        size = request.capacity_range.required_bytes
        known = self.volumes.setdefault(request.name, size)
        if known != size:
            servicer_context.abort(grpc.StatusCode.ALREADY_EXISTS, "a volume of that name has another size")
        volume = csi.Volume(volume_id=request.name, capacity_bytes=size, volume_context=context)
        return csi.CreateVolumeResponse(volume=volume)

    def DeleteVolume(self, data, servicer_context):
        request = csi.DeleteVolumeRequest.FromString(data)
        if not request.volume_id:
            servicer_context.abort(grpc.StatusCode.INVALID_ARGUMENT, "volume_id is required")
        self.volumes.pop(request.volume_id, None)
        return csi.DeleteVolumeResponse()

    def ValidateVolumeCapabilities(self, data, servicer_context):
        request = csi.ValidateVolumeCapabilitiesRequest.FromString(data)
        if not request.volume_id or not request.volume_capabilities:
            servicer_context.abort(grpc.StatusCode.INVALID_ARGUMENT, "volume_id and volume_capabilities are required")
        if request.volume_id not in self.volumes:
            servicer_context.abort(grpc.StatusCode.NOT_FOUND, "no such volume")
        confirmed = csi.ValidateVolumeCapabilitiesResponse.Confirmed(volume_capabilities=request.volume_capabilities)
        return csi.ValidateVolumeCapabilitiesResponse(confirmed=confirmed)


class Handlers(grpc.GenericRpcHandler):
    def __init__(self):
        self.controller = Controller()

    def service(self, call):
        _, service, name = call.method.split("/")
        if service != "csi.v1.Controller":
            return grpc.unary_unary_rpc_method_handler(forward(call.method))
        handle = getattr(self.controller, name, None)
        return handle and grpc.unary_unary_rpc_method_handler(
            handle, response_serializer=lambda reply: reply.SerializeToString())


server = grpc.server(futures.ThreadPoolExecutor(8))
server.add_generic_rpc_handlers((Handlers(),))
server.add_insecure_port(f"unix:{listen}")
server.start()
print("listening", flush=True)
sys.stdin.read()
server.stop(None)
