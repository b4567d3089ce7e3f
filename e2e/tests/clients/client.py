"""The Python client: lists, watches, patches, a custom resource, a review."""

import sys

from kubernetes import client, config, watch

config.load_kube_config(sys.argv[1])
core = client.CoreV1Api()
versions = client.VersionApi().get_code()
assert versions.major == "1", versions
names = [namespace.metadata.name for namespace in core.list_namespace().items]
assert "default" in names, names

made = core.create_namespaced_config_map("default", {"metadata": {"name": "py", "labels": {"by": "python"}}, "data": {"a": "1"}})
stream = watch.Watch()
seen = []
for event in stream.stream(core.list_namespaced_config_map, "default", label_selector="by=python", timeout_seconds=30):
    seen.append(event["type"])
    if len(seen) == 1:
        core.patch_namespaced_config_map("py", "default", {"data": {"b": "2"}})
    elif len(seen) == 2:
        assert event["object"].data == {"a": "1", "b": "2"}, event["object"].data
        core.delete_namespaced_config_map("py", "default")
    else:
        stream.stop()
assert seen == ["ADDED", "MODIFIED", "DELETED"], seen

pages, more = 0, None
for number in range(7):
    core.create_namespaced_config_map("default", {"metadata": {"name": f"page-{number}", "labels": {"page": "y"}}})
while True:
    page = core.list_namespaced_config_map("default", label_selector="page=y", limit=3, _continue=more)
    pages, more = pages + 1, page.metadata._continue
    if not more:
        break
assert pages == 3, pages
core.delete_collection_namespaced_config_map("default", label_selector="page=y")

custom = client.CustomObjectsApi()
herds = ("example.dev", "v1", "default", "herds")
custom.create_namespaced_custom_object(*herds, {"apiVersion": "example.dev/v1", "kind": "Herd", "metadata": {"name": "py"}, "spec": {"size": 1}})
custom.patch_namespaced_custom_object_status(*herds, "py", {"status": {"fed": True}})
assert custom.get_namespaced_custom_object(*herds, "py")["status"] == {"fed": True}
try:
    custom.create_namespaced_custom_object(*herds, {"apiVersion": "example.dev/v1", "kind": "Herd", "metadata": {"name": "bad"}, "spec": {"size": -1}})
    raise AssertionError("a herd of -1 was taken")
except client.ApiException as error:
    assert error.status == 422, error
custom.delete_namespaced_custom_object(*herds, "py")

review = client.AuthorizationV1Api().create_self_subject_access_review(
    {"spec": {"resourceAttributes": {"verb": "delete", "resource": "pods", "namespace": "default"}}}
)
assert review.status.allowed, review
print("all is well")
