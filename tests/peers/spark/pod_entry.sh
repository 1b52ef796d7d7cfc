#!/bin/sh
# What Spark's own image does for an executor (`entrypoint.sh executor` of 3.5): the name that it registers with is its pod's address.
set -e
[ "$1" = executor ] || exec "$@"
home=$(echo "$SPARK_HOME"/lib/python3*/site-packages/pyspark)
env | grep '^SPARK_JAVA_OPT_' | sort -t_ -k4 -n | sed 's/[^=]*=//' >/tmp/options
set --
while IFS= read -r option; do set -- "$@" "$option"; done </tmp/options
exec java "$@" "-Xms$SPARK_EXECUTOR_MEMORY" "-Xmx$SPARK_EXECUTOR_MEMORY" -cp "$home/jars/*" org.apache.spark.scheduler.cluster.k8s.KubernetesExecutorBackend \
  --driver-url "$SPARK_DRIVER_URL" --executor-id "$SPARK_EXECUTOR_ID" --cores "$SPARK_EXECUTOR_CORES" --app-id "$SPARK_APPLICATION_ID" \
  --hostname "$SPARK_EXECUTOR_POD_IP" --resourceProfileId "$SPARK_RESOURCE_PROFILE_ID" --podName "$SPARK_EXECUTOR_POD_NAME"
