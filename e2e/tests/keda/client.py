"""A client of KEDA's external scalers whose code is generated from the contract: asks what standard input says, a JSON object in
each line, and prints each answer as one."""

import json
import sys
import tempfile

import grpc
from google.protobuf import json_format
from grpc_tools import protoc

address, proto, certificates = sys.argv[1:4]
generated = tempfile.mkdtemp()
directory = proto.rsplit("/", 1)[0]
options = ["", f"-I{directory}", f"--python_out={generated}", f"--grpc_python_out={generated}", proto]
if protoc.main(options) != 0:
    sys.exit("the contract can't be compiled")
sys.path.insert(0, generated)
import externalscaler_pb2 as messages  # noqa: E402
import externalscaler_pb2_grpc as service  # noqa: E402


def read(name):
    with open(f"{certificates}/{name}", "rb") as file:
        return file.read()


keys = grpc.ssl_channel_credentials(read("ca.pem"), read("client.key"), read("client.pem"))
scaler = service.ExternalScalerStub(grpc.secure_channel(address, keys))


def text(message):
    return json_format.MessageToDict(message, always_print_fields_with_no_presence=True)


for line in sys.stdin:
    asked = json.loads(line)
    method, reference = asked["method"], messages.ScaledObjectRef(**asked["reference"])
    try:
        if method == "StreamIsActive":
            answers = scaler.StreamIsActive(reference, timeout=60)
            for answer in answers:
                print(json.dumps(text(answer)), flush=True)
                if answer.result == asked["until"]:
                    answers.cancel()
                    break
            continue
        if method == "GetMetrics":
            request = messages.GetMetricsRequest(scaledObjectRef=reference, metricName=asked["metric"])
        else:
            request = reference
        print(json.dumps(text(getattr(scaler, method)(request, timeout=20))), flush=True)
    except grpc.RpcError as error:
        print(json.dumps({"code": error.code().name, "details": error.details()}), flush=True)
