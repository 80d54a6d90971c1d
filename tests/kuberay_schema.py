"""The fields of KubeRay's `ray.io/v1` (1.6) that our manifests may use, as JSON schemas: no others pass."""


def closed(required=(), **fields):
    """An object of these fields and no others."""
    return {
        "type": "object",
        "additionalProperties": False,
        "required": list(required),
        "properties": {name.rstrip("_"): kind for name, kind in fields.items()},
    }


def many(items, least=0):
    return {"type": "array", "items": items, "minItems": least}


def one_of(*values):
    return {"enum": list(values)}


TEXT, YES_NO, COUNT = (
    {"type": "string", "minLength": 1},
    {"type": "boolean"},
    {"type": "integer", "minimum": 0},
)
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}  # numbers have to be quoted
QUANTITIES = {
    "type": "object",
    "additionalProperties": {"type": "string", "pattern": "^[0-9]+(m|Ki|Mi|Gi|Ti)?$"},
}

RESOURCES = closed(requests=QUANTITIES, limits=QUANTITIES)
CONTAINER = closed(
    ("name", "image", "resources"),
    name=TEXT,
    image={"type": "string", "pattern": "^[^:]+:[^:]+$"},
    imagePullPolicy=one_of("Always", "IfNotPresent", "Never"),
    env=many(closed(("name", "value"), name=TEXT, value={"type": "string"})),
    resources=RESOURCES,
    ports=many(closed(("containerPort",), name=TEXT, containerPort=COUNT)),
    volumeMounts=many(closed(("name", "mountPath"), name=TEXT, mountPath=TEXT, readOnly=YES_NO)),
)
POD = closed(
    ("spec",),
    metadata=closed(labels=TEXTS, annotations=TEXTS),
    spec=closed(
        ("containers",),
        serviceAccountName=TEXT,
        nodeSelector=TEXTS,
        containers=many(CONTAINER, 1),
        tolerations=many(
            closed(
                key=TEXT,
                operator=one_of("Exists", "Equal"),
                value=TEXT,
                effect=one_of("NoSchedule", "PreferNoSchedule", "NoExecute"),
            )
        ),
        volumes=many(
            closed(
                ("name",),
                name=TEXT,
                emptyDir=closed(medium=one_of("", "Memory"), sizeLimit=TEXT),
                secret=closed(("secretName",), secretName=TEXT),
            )
        ),
    ),
)
CLUSTER = closed(
    ("rayVersion", "headGroupSpec", "workerGroupSpecs"),
    rayVersion={"type": "string", "pattern": r"^[0-9]+\.[0-9]+\.[0-9]+$"},
    authOptions=closed(("mode",), mode=one_of("token", "disabled")),
    enableInTreeAutoscaling=YES_NO,
    autoscalerOptions=closed(
        version=one_of("v1", "v2"),
        idleTimeoutSeconds=COUNT,
        upscalingMode=one_of("Default", "Aggressive", "Conservative"),
        resources=RESOURCES,
    ),
    headGroupSpec=closed(
        ("rayStartParams", "template"),
        rayStartParams=TEXTS,
        serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"),
        template=POD,
    ),
    workerGroupSpecs=many(
        closed(
            ("groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"),
            groupName=TEXT,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            numOfHosts=COUNT,
            rayStartParams=TEXTS,
            template=POD,
        ),
        1,
    ),
)
JOB = closed(
    ("entrypoint", "rayClusterSpec"),
    entrypoint=TEXT,
    runtimeEnvYAML=TEXT,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    activeDeadlineSeconds=COUNT,
    backoffLimit=COUNT,
    shutdownAfterJobFinishes=YES_NO,
    ttlSecondsAfterFinished=COUNT,
    suspend=YES_NO,
    metadata=TEXTS,
    rayClusterSpec=CLUSTER,
)
SERVICE = closed(("serveConfigV2", "rayClusterConfig"), serveConfigV2=TEXT, rayClusterConfig=CLUSTER)


def _resource(kind, spec):
    return closed(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=closed(
            ("name",),
            # A name that a service can have too.
            name={"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 47},
            namespace=TEXT,
            labels=TEXTS,
            annotations=TEXTS,
        ),
        spec=spec,
    )


SCHEMAS = {
    kind: _resource(kind, spec)
    for kind, spec in (("RayCluster", CLUSTER), ("RayJob", JOB), ("RayService", SERVICE))
}
