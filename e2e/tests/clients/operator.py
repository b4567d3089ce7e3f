"""An operator as people write them: a config map for each herd, kept as large as the herd says."""

import kopf
import kubernetes


@kopf.on.startup()
def configure(settings: kopf.OperatorSettings, **_):
    settings.persistence.finalizer = "example.dev/operator"
    settings.posting.level = 20


@kopf.on.create("example.dev", "v1", "herds")
@kopf.on.update("example.dev", "v1", "herds")
def grow(spec, name, namespace, body, **_):
    api = kubernetes.client.CoreV1Api()
    wanted = {str(number): "cow" for number in range(spec.get("size", 0))}
    config_map = {"metadata": {"name": f"herd-{name}"}, "data": wanted}
    kopf.adopt(config_map, owner=body)
    try:
        api.create_namespaced_config_map(namespace, config_map)
    except kubernetes.client.ApiException as error:
        if error.status != 409:
            raise
        api.replace_namespaced_config_map(f"herd-{name}", namespace, config_map)
    return {"cows": len(wanted)}


@kopf.on.delete("example.dev", "v1", "herds")
def bury(name, logger, **_):
    logger.info(f"herd {name} is gone")
