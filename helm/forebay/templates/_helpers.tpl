{{/* Names and labels */}}
{{- define "forebay.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "forebay.selector" -}}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .role }}
{{- end -}}

{{- define "forebay.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{ include "forebay.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* What is above `spec` in every object: root, role, and a suffix of the name */}}
{{- define "forebay.metadata" -}}
name: {{ include "forebay.fullname" .root }}{{ .suffix }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "forebay.labels" . | nindent 2 }}
  {{- with .labels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- $annotations := merge (dict) (.annotations | default dict) .root.Values.commonAnnotations }}
{{- with $annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "forebay.image" -}}
{{- $i := .Values.image -}}
{{- if $i.digest -}}{{ $i.repository }}@{{ $i.digest }}{{- else -}}{{ $i.repository }}:{{ $i.tag | default .Chart.AppVersion }}{{- end -}}
{{- end -}}

{{- define "forebay.serviceAccount" -}}
{{- if .root.Values.serviceAccount.create -}}{{ include "forebay.fullname" .root }}-{{ .role }}{{- else -}}{{ .root.Values.serviceAccount.name | default "default" }}{{- end -}}
{{- end -}}

{{- define "forebay.clusterSecret" -}}
{{- .Values.clusterSecret.existingSecret | default (printf "%s-cluster" (include "forebay.fullname" .)) -}}
{{- end -}}

{{/* "1Gi" -> 1073741824 */}}
{{- define "forebay.bytes" -}}
{{- $text := toString (kindIs "float64" . | ternary (int64 .) .) -}}
{{- $number := regexFind "^[0-9.]+" $text -}}
{{- $unit := trimPrefix $number $text | trim | trimSuffix "B" -}}
{{- $units := dict "" 1 "k" 1000 "K" 1000 "M" 1000000 "G" 1000000000 "T" 1000000000000 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- if or (not $number) (not (hasKey $units $unit)) -}}
{{- fail (printf "%q is no size: write it like 512Mi or 100Gi" $text) -}}
{{- end -}}
{{- mulf (float64 $number) (get $units $unit) | int64 -}}
{{- end -}}

{{/* What a folder's volume has beyond the quota, in Mi: names, heads of blocks, and a block that comes while another goes */}}
{{- define "forebay.volumeMi" -}}
{{- $bytes := include "forebay.bytes" . | int64 -}}
{{- add (div (mul $bytes 102) 104857600) 65 -}}
{{- end -}}

{{/* Mi of the MEM tier that count against the worker's memory limit */}}
{{- define "forebay.memMi" -}}
{{- $sum := 0 -}}
{{- range .Values.worker.tiers -}}
{{- if eq .medium "MEM" -}}
{{- range .dirs -}}
{{- if eq .type "emptyDir" -}}{{- $sum = add $sum (include "forebay.volumeMi" .quota | int64) -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $sum -}}
{{- end -}}

{{/* The memory limit of a worker. Fails where what is given cannot hold the MEM tier */}}
{{- define "forebay.workerMemory" -}}
{{- $mem := include "forebay.memMi" . | int64 -}}
{{- $overhead := div (include "forebay.bytes" .Values.worker.memory.overhead | int64) 1048576 -}}
{{- $needed := add $mem $overhead -}}
{{- $given := .Values.worker.memory.limit | default (dig "limits" "memory" "" .Values.worker.resources) -}}
{{- if $given -}}
{{- if lt (div (include "forebay.bytes" $given | int64) 1048576) $needed -}}
{{- fail (printf "worker.memory.limit is %s, and the MEM tier with worker.memory.overhead takes %dMi: the worker would be killed when its tier fills. Raise the limit, or lower the quotas of the MEM tier" $given $needed) -}}
{{- end -}}
{{- $given -}}
{{- else -}}
{{- printf "%dMi" $needed -}}
{{- end -}}
{{- end -}}

{{/* Values that no schema can check */}}
{{- define "forebay.check" -}}
{{- $order := dict "MEM" 0 "SSD" 1 "HDD" 2 -}}
{{- $last := -1 -}}
{{- range .Values.worker.tiers -}}
{{- if le (get $order .medium | int) $last -}}{{- fail "worker.tiers: each medium once, in the order MEM, SSD, HDD" -}}{{- end -}}
{{- $last = get $order .medium | int -}}
{{- range .dirs -}}
{{- if and (eq .type "persistentVolumeClaim") (ne $.Values.worker.kind "StatefulSet") -}}
{{- fail "worker.tiers: a persistentVolumeClaim folder needs worker.kind StatefulSet: the pods of a DaemonSet would share one claim" -}}
{{- end -}}
{{- if and (eq .type "hostPath") (eq $.Values.worker.kind "StatefulSet") -}}
{{- fail "worker.tiers: a hostPath folder needs worker.kind DaemonSet: two pods of a StatefulSet on one node would share it" -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and (eq .Values.worker.data.type "persistentVolumeClaim") (ne .Values.worker.kind "StatefulSet") -}}
{{- fail "worker.data: a persistentVolumeClaim needs worker.kind StatefulSet" -}}
{{- end -}}
{{- if and (eq .Values.worker.data.type "hostPath") (eq .Values.worker.kind "StatefulSet") -}}
{{- fail "worker.data: a hostPath needs worker.kind DaemonSet: two pods of a StatefulSet on one node would share it" -}}
{{- end -}}
{{- if and .Values.worker.autoscaling.enabled (ne .Values.worker.kind "StatefulSet") -}}
{{- fail "worker.autoscaling needs worker.kind StatefulSet: a DaemonSet has as many workers as nodes" -}}
{{- end -}}
{{- if gt (int .Values.worker.autoscaling.minReplicas) (int .Values.worker.autoscaling.maxReplicas) -}}
{{- fail "worker.autoscaling: minReplicas is above maxReplicas" -}}
{{- end -}}
{{- range .Values.mounts -}}
{{- range $name := keys (.options | default dict) -}}
{{- if regexMatch "secret|token|password|credential|access_key|account_key|encryption_key|customer_key|delegation|sas" (lower $name) -}}
{{- fail (printf "mounts: options.%s would stand in a ConfigMap for everybody to read: name a Secret under secretOptions" $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and (not .Values.serviceAccount.create) (not .Values.serviceAccount.name) .Values.rbac.create (ne .Values.locality.policy "none") -}}
{{- fail "serviceAccount.create is false and serviceAccount.name empty: rbac.create would let the namespace's default account see all pods" -}}
{{- end -}}
{{- if and (eq .Values.locality.policy "pods") (not .Values.locality.podSelector) -}}
{{- fail "locality.policy pods needs locality.podSelector, like app.kubernetes.io/name=trino" -}}
{{- end -}}
{{- if and .Values.fuse.enabled (hasPrefix (printf "%s/" .Values.shortCircuit.hostPath) (printf "%s/" .Values.fuse.hostPath)) -}}
{{- fail "fuse.hostPath must not lie in shortCircuit.hostPath" -}}
{{- end -}}
{{- end -}}

{{/* The configuration of one role: root, role, and the number of its own keys on top of what all have */}}
{{- define "forebay.toml" -}}
{{- $v := .root.Values -}}
{{- $all := dict
  "client.master" (printf "%s.%s.svc:%v" (include "forebay.fullname" .root) .root.Release.Namespace $v.master.ports.rpc)
  "client.socket_dir" $v.shortCircuit.hostPath
  "client.short_circuit" $v.shortCircuit.enabled
  "security.allow_insecure_bind" true
-}}
{{- if has .role (list "master" "worker") -}}
{{- $_ := set $all "security.cluster_secret_file" "/etc/forebay-secret/secret" -}}
{{- end -}}
{{- $own := dict -}}
{{- /* The master's user is the superuser: workers that leave, and mounts that act for everybody on their node, come in its name. */ -}}
{{- $user := toString (int64 $v.podSecurityContext.runAsUser) -}}
{{- if ne .role "master" -}}
{{- $_ := set $own "client.user" (ternary "forebay" $user (eq $user "1000")) -}}
{{- end -}}
{{- if eq .role "master" -}}
{{- $own = dict
  "master.bind" "0.0.0.0"
  "master.data_dir" "/var/lib/forebay/master"
  "master.rpc_port" $v.master.ports.rpc
  "master.web_port" $v.master.ports.web
  "master.hadoop" (gt (int $v.master.ports.hadoop) 0)
  "kubernetes.locality" $v.locality.policy
  "kubernetes.pod_selector" $v.locality.podSelector
  "kubernetes.namespaces" $v.locality.namespaces
  "kubernetes.java_short_circuit" (and $v.shortCircuit.enabled $v.locality.javaShortCircuit)
  "kubernetes.socket_dir" $v.shortCircuit.hostPath
-}}
{{- if gt (int $v.master.ports.hadoop) 0 }}{{ $_ := set $own "master.hadoop_port" $v.master.ports.hadoop }}{{ end -}}
{{- else if eq .role "worker" -}}
{{- $own = merge $own (dict
  "worker.bind" "0.0.0.0"
  "worker.data_dir" "/var/lib/forebay/worker"
  "worker.data_port" $v.worker.ports.data
  "worker.web_port" $v.worker.ports.web
  "worker.socket_dir" $v.shortCircuit.hostPath
  "worker.mem_mount" (ternary "always" "never" $v.worker.hugePages)
  "worker.hadoop" (gt (int $v.worker.ports.hadoop) 0)
) -}}
{{- if gt (int $v.worker.ports.hadoop) 0 -}}
{{- $_ := set $own "worker.hadoop_port" $v.worker.ports.hadoop -}}
{{- $_ := set $own "worker.hadoop_ipc_port" $v.worker.ports.hadoopIpc -}}
{{- end -}}
{{- else -}}
{{- $_ := set $own "fuse.staging_dir" "/var/lib/forebay/staging" -}}
{{- end -}}
{{- $own = mergeOverwrite (dict) $all $own $v.properties (get $v .role).properties -}}
# Written by the chart from its values.
{{ range $key := keys $own | sortAlpha -}}
{{ $key }} = {{ get $own $key | toJson }}
{{ end -}}
{{- if eq .role "worker" -}}
worker.tiers = [
{{- range $t, $tier := $v.worker.tiers }}
  {medium = {{ $tier.medium | toJson }}, dirs = [
{{- range $d, $dir := $tier.dirs }}
    {path = "/tiers/{{ $t }}-{{ $d }}", quota = "{{ include "forebay.bytes" $dir.quota }}B"{{ with $dir.reserve }}, reserve = "{{ include "forebay.bytes" . }}B"{{ end }}},
{{- end }}
  ]},
{{- end }}
]
{{ end -}}
{{- if eq .role "master" -}}
{{- range $m, $mount := $v.mounts }}
[[mount]]
path = {{ $mount.path | toJson }}
uri = {{ $mount.uri | toJson }}
read_only = {{ $mount.readOnly | default false }}
{{- range $key := keys ($mount.options | default dict) | sortAlpha }}
options.{{ $key }} = {{ get $mount.options $key | toString | toJson }}
{{- end }}
{{- range $key := keys ($mount.secretOptions | default dict) | sortAlpha }}
options.{{ $key }} = { env = "FOREBAY_SECRET_{{ $m }}_{{ $key | upper }}" }
{{- end }}
{{ end -}}
{{- end -}}
{{- end -}}

{{/* Parts of every pod: root, role, and the values of the role */}}
{{- define "forebay.podMetadata" -}}
labels:
  {{- include "forebay.labels" . | nindent 2 }}
  {{- with merge (dict) .values.podLabels .root.Values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
annotations:
  {{- if ne .role "keeper" }}
  checksum/config: {{ include "forebay.toml" . | sha256sum }}
  {{- end }}
  {{- if and .root.Values.metrics.annotations .webPort }}
  prometheus.io/scrape: "true"
  prometheus.io/port: {{ .webPort | quote }}
  {{- end }}
  {{- with merge (dict) .values.podAnnotations .root.Values.podAnnotations .root.Values.commonAnnotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{- define "forebay.scheduling" -}}
serviceAccountName: {{ include "forebay.serviceAccount" . }}
# Only these two ask the API server for anything.
automountServiceAccountToken: {{ or (eq .role "csi-controller") (and (eq .role "master") (ne .root.Values.locality.policy "none")) }}
# Services of this namespace are no configuration.
enableServiceLinks: false
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end -}}

{{- define "forebay.env" -}}
- {name: FOREBAY_CONFIG, value: /etc/forebay/forebay.toml}
- name: FOREBAY_CLIENT__NODE_NAME
  valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
{{- with .root.Values.env }}
{{ toYaml . }}
{{- end }}
{{- with .values.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "forebay.configVolumes" -}}
- name: config
  configMap: {name: {{ include "forebay.fullname" .root }}-{{ .role }}}
{{- if has .role (list "master" "worker") }}
- name: cluster-secret
  secret: {secretName: {{ include "forebay.clusterSecret" .root }}, items: [{key: secret, path: secret}]}
{{- end }}
{{- end -}}

{{- define "forebay.configMounts" -}}
- {name: config, mountPath: /etc/forebay, readOnly: true}
{{- if has .role (list "master" "worker") }}
- {name: cluster-secret, mountPath: /etc/forebay-secret, readOnly: true}
{{- end }}
{{- end -}}
