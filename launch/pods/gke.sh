#!/usr/bin/env bash
# Trains on GKE: prints a JobSet of one process a TPU host, for kubectl, or starts the same with XPK.
#
#   bash launch/pods/gke.sh --name=dalle2 --image=REGISTRY/dalle2-jax:tpu --accelerator=tpu-v5p-slice --topology=4x4x4 \
#       --hosts=16 -- --config=configs/decoder64.py --workdir=gs://BUCKET/DIR --config.data.path=/data | kubectl apply -f -
#   bash launch/pods/gke.sh --xpk=CLUSTER --type=v5p-128 --name=... --image=... -- --config=...
#
#   --name, --image           of the JobSet; an image of launch/Dockerfile
#   --accelerator, --topology of the node pool, by its labels cloud.google.com/gke-tpu-accelerator and -topology
#   --hosts                   machines of a slice             --chips=4   chips of a machine
#   --slices=1                slices                          --restarts=100   after failures and preemptions
#   --volume=                 a claim to mount at /data
#   --xpk=CLUSTER --type=     hand the command to XPK instead
#
# A preempted pod gets SIGTERM and ten minutes, in which training saves; job.sh then reports an unfinished training.
# Status 2 (wrong settings) and 3 (numbers that are not finite) end the JobSet; any other restarts it from the last
# checkpoint. XPK restarts after 127 and above, and by this script's argument after 1 and 4.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse name=? image=? accelerator= topology= hosts= chips=4 slices=1 restarts=100 volume= xpk= type= -- "$@"
check_training

if [ -n "$xpk" ]; then
  [ -n "$type" ] || fail "--xpk needs --type=..., such as v5p-128"
  need xpk
  run xpk workload create --cluster="$xpk" --workload="$name" --docker-image="$image" --tpu-type="$type" \
    --num-slices="$slices" --max-restarts="$restarts" --restart-on-exit-codes=1,4 \
    --termination-grace-period-seconds=600 \
    --command="bash launch/pods/job.sh python -m dalle2_jax.train $(quoted "${TRAIN[@]}")"
  exit
fi
for setting in accelerator topology hosts; do [ -n "${!setting}" ] || fail "give --$setting=..."; done
for setting in hosts chips slices restarts; do
  [[ ${!setting} =~ ^[0-9]+$ ]] || fail "--$setting=${!setting} must be a whole number"
done
[[ $name =~ ^[a-z]([a-z0-9-]{0,40}[a-z0-9])?$ ]] || fail "--name=$name must be lower-case letters, digits and -"

# A text as a YAML string: JSON's, which YAML reads.
text() {
  local escaped=${1//\\/\\\\}
  printf '"%s"' "${escaped//\"/\\\"}"
}

cat << YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $restarts
    rules:
      - action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: $slices
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          completionMode: Indexed
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes:
                  containerName: train
                  operator: In
                  values: [2, 3]
          template:
            spec:
              restartPolicy: Never
              hostNetwork: true
              dnsPolicy: ClusterFirstWithHostNet
              terminationGracePeriodSeconds: 600
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $(text "$accelerator")
                cloud.google.com/gke-tpu-topology: $(text "$topology")
              containers:
                - name: train
                  image: $(text "$image")
                  ports:
                    - containerPort: 8471
                    - containerPort: 8431
                  securityContext:
                    privileged: true
                  command: [bash, launch/pods/job.sh]
                  args:
                    - python
                    - -m
                    - dalle2_jax.train
$(for word in "${TRAIN[@]}"; do printf '                    - %s\n' "$(text "$word")"; done)
                  resources:
                    requests:
                      google.com/tpu: $chips
                    limits:
                      google.com/tpu: $chips
$(if [ -n "$volume" ]; then
  printf '                  volumeMounts:\n                    - name: data\n                      mountPath: /data\n'
  printf '              volumes:\n                - name: data\n                  persistentVolumeClaim:\n'
  printf '                    claimName: %s\n' "$volume"
fi)
YAML
