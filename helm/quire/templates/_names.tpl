{{/* Begins the names of all objects; leaves room for "-control-plane-headless" and pods' numbers. Names of
Services have no dots, names of releases may. What is too long ends with a hash of the whole, or releases
that differ at their end only would take each other's names. */}}
{{- define "quire.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $whole := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- if gt (len $whole) 40 -}}
{{- printf "%s-%s" (trunc 33 $whole) (sha256sum $whole | trunc 6) | replace "." "-" -}}
{{- else -}}
{{- replace "." "-" $whole -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "quire.serviceAccountName" -}}
{{- .Values.serviceAccount.name | default (ternary (include "quire.fullname" .) "default" .Values.serviceAccount.create) -}}
{{- end -}}

{{/* What selects a component's pods. Takes a list: root, component. */}}
{{- define "quire.selector" -}}
{{- $root := first . -}}
app.kubernetes.io/name: {{ default $root.Chart.Name $root.Values.nameOverride | quote }}
app.kubernetes.io/instance: {{ $root.Release.Name | quote }}
app.kubernetes.io/component: {{ last . }}
{{- end -}}

{{/* Labels of an object. Takes a list: root, component. */}}
{{- define "quire.labels" -}}
{{- $root := first . -}}
{{ include "quire.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
app.kubernetes.io/part-of: quire
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- with $root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Labels of a component's pods: none that a new version of the chart would change, for loading a model
again takes long. Takes a list: root, component. */}}
{{- define "quire.podLabels" -}}
{{ include "quire.selector" . }}
{{- with (first .).Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Name and labels of a component's object. Takes a list: root, component, and a suffix if any. */}}
{{- define "quire.metadata" -}}
{{- $root := first . -}}
{{- $component := index . 1 -}}
name: {{ include "quire.fullname" $root }}-{{ $component }}{{ with slice . 2 }}-{{ first . }}{{ end }}
namespace: {{ $root.Release.Namespace | quote }}
labels:
  {{- include "quire.labels" (list $root $component) | nindent 2 }}
{{- end -}}

{{- define "quire.domain" -}}
{{ .Release.Namespace }}.svc.{{ .Values.clusterDomain }}
{{- end -}}

{{/* host:port of the inference API, for clients in the cluster. */}}
{{- define "quire.address" -}}
{{ include "quire.fullname" . }}-control-plane.{{ include "quire.domain" . }}:7401
{{- end -}}

{{/* Name of what makes the engines' pods, and of the Service that names them. With several nodes it is another
one, for an upgrade makes the new set before the old one goes, and short enough for what LeaderWorkerSet
puts behind it to name StatefulSets of workers. */}}
{{- define "quire.engineSet" -}}
{{ include "quire.fullname" . }}-{{ ternary "engine" "data-plane" (gt (int .Values.dataPlane.nodes) 1) }}
{{- end -}}

{{/* host:port of each engine's first pod, separated by commas. */}}
{{- define "quire.engines" -}}
{{- $service := include "quire.engineSet" . -}}
{{- $engines := list -}}
{{- range $number := until (int .Values.dataPlane.replicas) -}}
{{- $engines = append $engines (printf "%s-%d.%s.%s:7411" $service $number $service (include "quire.domain" $)) -}}
{{- end -}}
{{- join "," $engines -}}
{{- end -}}

{{- define "quire.indexNamespace" -}}
{{- .Values.indexNamespace | default (printf "%s.%s" .Release.Namespace (include "quire.fullname" .)) -}}
{{- end -}}

{{/* Name of the secret with a component's certificate. Takes a list: root, component in camelCase. */}}
{{- define "quire.tlsSecret" -}}
{{- $root := first . -}}
{{- $made := printf "%s-%s-tls" (include "quire.fullname" $root) (last . | kebabcase) -}}
{{- ternary $made (index $root.Values.tls.existingSecrets (last .)) $root.Values.tls.certManager.enabled -}}
{{- end -}}

{{/* Name of the claim that holds the model; empty: the demo model is served. */}}
{{- define "quire.modelClaim" -}}
{{- with .Values.dataPlane.model -}}
{{- .existingClaim | default (ternary (printf "%s-model" (include "quire.fullname" $)) "" .claim.create) -}}
{{- end -}}
{{- end -}}

{{/* Name in the control plane's certificate, by which engines know leaders and replicas each other. */}}
{{- define "quire.leaderName" -}}
{{ include "quire.fullname" . }}-control-plane.{{ include "quire.domain" . }}
{{- end -}}

{{/* What the prefix index needs of Redis, as rules of an ACL. Before 7.0 @connection had all of CLIENT. */}}
{{- define "quire.redisRights" -}}
resetkeys ~{{ include "quire.indexNamespace" . }}:* resetchannels -@all +@connection -client +client|setinfo +client|setname +eval +evalsha +smismember +sadd +srem +expire +unlink +get +incr +hset +hsetnx +hdel +hgetall +hincrby
{{- end -}}

{{/* Not empty: `helm test` has a role to generate, or shows what may have it. */}}
{{- define "quire.testMayGenerate" -}}
{{- $certificate := and .Values.tls.enabled (or .Values.tls.certManager.enabled .Values.tls.existingSecrets.client) -}}
{{- if or $certificate .Values.access.testSecret (has "generate" .Values.access.anonymousRoles) }}true{{ end -}}
{{- end -}}

{{/* Seconds of a duration, as 1h30m. */}}
{{- define "quire.seconds" -}}
{{- $sum := 0 -}}
{{- range $unit, $seconds := dict "h" 3600 "m" 60 "s" 1 -}}
{{- range regexFindAll (printf "[0-9]+%s" $unit) $ -1 -}}
{{- $sum = add $sum (mul (trimSuffix $unit . | int64) $seconds) -}}
{{- end -}}
{{- end -}}
{{- $sum -}}
{{- end -}}

{{/* Takes a dict: root, component, issuer, names, addresses. */}}
{{- define "quire.certificate" }}
{{- $values := .root.Values.tls.certManager }}
apiVersion: cert-manager.io/v1
kind: Certificate
metadata:
  {{- include "quire.metadata" (list .root .component) | nindent 2 }}
spec:
  secretName: {{ include "quire.fullname" .root }}-{{ .component }}-tls
  dnsNames:
    {{- toYaml .names | nindent 4 }}
  {{- with .addresses }}
  ipAddresses:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  # Planes use their one certificate on both sides of a connection.
  usages: [digital signature, server auth, client auth]
  duration: {{ $values.duration }}
  renewBefore: {{ $values.renewBefore }}
  privateKey: {algorithm: ECDSA, size: 256, rotationPolicy: Always}
  issuerRef:
    {{- toYaml .issuer | nindent 4 }}
{{- end -}}
