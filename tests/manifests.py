"""What manifests and commands for schedulers may hold, in our own words and as far as ours go.

A description is {field: what}, of which 'field!' has to be there and '*' is any other; [what] of each item; a
type, a set of values, or a regular expression that a text matches whole.
"""

import re

NAME, COUNT, TEXT, TEXTS = r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", int, str, {"*": str}
QUANTITIES = {"*": int}
CONTAINER = {
    "name!": NAME,
    "image!": TEXT,
    "command": [TEXT],
    "args": [TEXT],
    "env": [{"name!": r"[A-Za-z_]\w*", "value": TEXT}],
    "ports": [{"containerPort!": COUNT, "name": NAME, "protocol": {"TCP", "UDP", "SCTP"}}],
    "resources": {"requests": QUANTITIES, "limits": QUANTITIES},
    "securityContext": {"privileged": bool, "runAsUser": COUNT},
    "volumeMounts": [{"name!": NAME, "mountPath!": r"/.*", "readOnly": bool, "subPath": TEXT}],
}
POD = {
    "restartPolicy!": {"Never", "OnFailure"},  # of a Job's pods
    "hostNetwork": bool,
    "dnsPolicy": {"ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"},
    "terminationGracePeriodSeconds": COUNT,
    "nodeSelector": TEXTS,
    "tolerations": [{"key": TEXT, "operator": {"Exists", "Equal"}, "value": TEXT, "effect": TEXT}],
    "serviceAccountName": NAME,
    "containers!": [CONTAINER],
    "volumes": [
        {
            "name!": NAME,
            "persistentVolumeClaim": {"claimName!": NAME, "readOnly": bool},
            "emptyDir": {"medium": TEXT, "sizeLimit": TEXT},
        }
    ],
}
EXIT_CODES = {"containerName": NAME, "operator!": {"In", "NotIn"}, "values!": [COUNT]}
JOB = {
    "parallelism": COUNT,
    "completions": COUNT,
    "completionMode": {"Indexed", "NonIndexed"},
    "backoffLimit": COUNT,
    "activeDeadlineSeconds": COUNT,
    "podFailurePolicy": {
        "rules!": [
            {"action!": {"FailJob", "FailIndex", "Ignore", "Count"}, "onExitCodes": EXIT_CODES},
        ]
    },
    "template!": {"metadata": {"labels": TEXTS, "annotations": TEXTS}, "spec!": POD},
}
REASONS = {
    "BackoffLimitExceeded",
    "DeadlineExceeded",
    "FailedIndexes",
    "MaxFailedIndexesExceeded",
    "PodFailurePolicy",
}
JOBSET = {
    "apiVersion!": r"jobset\.x-k8s\.io/v1alpha2",
    "kind!": {"JobSet"},
    "metadata!": {"name!": NAME, "namespace": NAME, "labels": TEXTS, "annotations": TEXTS},
    "spec!": {
        "failurePolicy": {
            "maxRestarts": COUNT,
            "rules": [
                {
                    "name": TEXT,
                    "action!": {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"},
                    "onJobFailureReasons": [REASONS],
                    "targetReplicatedJobs": [NAME],
                }
            ],
        },
        "successPolicy": {"operator!": {"All", "Any"}, "targetReplicatedJobs": [NAME]},
        "replicatedJobs!": [{"name!": NAME, "replicas": COUNT, "template!": {"spec!": JOB}}],
    },
}
SKYPILOT = {
    "name": NAME,
    "workdir": TEXT,
    "num_nodes": COUNT,
    "resources": {
        "infra": TEXT,
        "accelerators": r"[A-Za-z0-9-]+(:\d+)?",
        "instance_type": TEXT,
        "use_spot": bool,
        "disk_size": COUNT,
        "image_id": TEXT,
        "job_recovery": {
            "strategy": {"EAGER_NEXT_REGION", "FAILOVER"},
            "max_restarts_on_errors": COUNT,
            "recover_on_exit_codes": [COUNT],
        },
    },
    "envs": TEXTS,
    "secrets": TEXTS,
    "file_mounts": {"*": TEXT},
    "setup": TEXT,
    "run": TEXT,
}
# Options of `xpk workload create`, those that could matter here.
XPK = {
    "cluster",
    "command",
    "docker-image",
    "env",
    "max-restarts",
    "num-slices",
    "priority",
    "project",
    "restart-on-exit-codes",
    "termination-grace-period-seconds",
    "tpu-type",
    "workload",
    "zone",
}


def unfit(value, what, where: str = "") -> list[str]:
    """Where a manifest is not what a description above says."""
    if isinstance(what, dict):
        if not isinstance(value, dict):
            return [f"{where} is {value!r}, not fields"]
        named = {name.rstrip("!"): inner for name, inner in what.items()}
        found = [
            f"{where}.{name[:-1]} is missing" for name in what if name[-1] == "!" and name[:-1] not in value
        ]
        for name, inner in value.items():
            known = named.get(name, named.get("*"))
            found += (
                [f"{where}.{name} is unknown"] if known is None else unfit(inner, known, f"{where}.{name}")
            )
        return found
    if isinstance(what, list):
        if not isinstance(value, list) or not value:
            return [f"{where} is {value!r}, not items"]
        return [line for i, item in enumerate(value) for line in unfit(item, what[0], f"{where}[{i}]")]
    if isinstance(what, type):
        good = type(value) is what and not (what is int and value < 0)
    else:
        good = value in what if isinstance(what, set) else bool(re.fullmatch(what, str(value)))
    return [] if good else [f"{where} is {value!r}"]
