{{- define "quire.image" -}}
{{- $image := index .component "image" -}}
{{ $image.repository }}{{ if $image.digest }}@{{ $image.digest }}{{ else }}:{{ $image.tag | default .root.Chart.AppVersion }}{{ end }}
{{- end -}}

{{/* What all pods have in common, for "restricted". Takes a dict: root, component (its values, or an
empty dict), user, group. */}}
{{- define "quire.pod" -}}
serviceAccountName: {{ include "quire.serviceAccountName" .root | quote }}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  {{- if not (kindIs "invalid" .user) }}
  runAsUser: {{ int .user }}
  runAsGroup: {{ int .user }}
  {{- end }}
  {{- if not (kindIs "invalid" .group) }}
  fsGroup: {{ int .group }}
  fsGroupChangePolicy: OnRootMismatch
  {{- end }}
  seccompProfile:
    type: RuntimeDefault
{{- range $name := list "nodeSelector" "tolerations" "affinity" "priorityClassName" }}
{{- with index $.component $name }}
{{ $name }}:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "quire.containerSecurity" -}}
securityContext:
  runAsNonRoot: true
  readOnlyRootFilesystem: true
  allowPrivilegeEscalation: false
  capabilities:
    drop: [ALL]
  seccompProfile:
    type: RuntimeDefault
{{- end -}}

{{/* Lines of a settings file: what the chart knows, then what the values add. Takes a list: dict, dict. */}}
{{- define "quire.settings" -}}
{{- mergeOverwrite (dict) (first .) (last .) | toYaml -}}
{{- end -}}

{{/* Settings of either plane for TLS. */}}
{{- define "quire.tlsSettings" -}}
{{- if .Values.tls.enabled -}}
tls_certificate: /etc/quire/tls/tls.crt
tls_key: /etc/quire/tls/tls.key
tls_ca: /etc/quire/tls/ca.crt
{{- end -}}
{{- end -}}

{{/* GPUs of an engine's pod, each of which is a rank's. */}}
{{- define "quire.ranks" -}}
{{- div .Values.dataPlane.tensorParallel .Values.dataPlane.nodes -}}
{{- end -}}

{{/* MiB of host memory of an engine's pod. */}}
{{- define "quire.dataPlaneMemoryMib" -}}
{{- $plane := .Values.dataPlane -}}
{{- $blocks := ternary 0 (int ($plane.kvMemoryMib | default 512)) $plane.gpu.enabled -}}
{{- $ofRank := add $plane.memoryMib $plane.swapMemoryMib $blocks -}}
{{- add $plane.sharedMemoryMib (mul (include "quire.ranks" .) $ofRank) -}}
{{- end -}}

{{/* How many processes each rank compiles with: its share of the cores that are asked for, and torch's 32 at
most. torch itself would go by the node's cores, and each process takes memory. */}}
{{- define "quire.compileThreads" -}}
{{- $cpu := toString .Values.dataPlane.cpu -}}
{{- $cores := ternary (divf (trimSuffix "m" $cpu) 1000) (float64 $cpu) (hasSuffix "m" $cpu) -}}
{{- divf $cores (include "quire.ranks" .) | int | max 1 | min 32 -}}
{{- end -}}

{{/* The password of Redis's user: given, else that of the last revision, else a random one; the same
wherever one rendering asks for it. */}}
{{- define "quire.redisPassword" -}}
{{- if .Values.redis.password -}}
{{- .Values.redis.password -}}
{{- else -}}
{{- $name := printf "%s-redis" (include "quire.fullname" .) -}}
{{- $before := dig "data" "password" "" (lookup "v1" "Secret" .Release.Namespace $name | default dict) -}}
{{- if and (not $before) (not (index .Values.redis "_made")) -}}
{{- $_ := set .Values.redis "_made" (randAlphaNum 32) -}}
{{- end -}}
{{- $before | b64dec | default (index .Values.redis "_made") -}}
{{- end -}}
{{- end -}}

{{/* Names of the container ports, by number. */}}
{{- define "quire.ports" -}}
ports:
{{- range $name, $port := . }}
  - name: {{ $name }}
    containerPort: {{ $port }}
{{- end }}
{{- end -}}

{{/* A pod's volume with a component's certificate. Takes a list: root, component in camelCase. */}}
{{- define "quire.tlsVolume" -}}
- name: tls
  secret:
    secretName: {{ include "quire.tlsSecret" . }}
    defaultMode: 0440
    items:
      - {key: tls.crt, path: tls.crt}
      - {key: tls.key, path: tls.key}
      - {key: ca.crt, path: ca.crt}
{{- end -}}

{{/* Name and password for Redis as environment variables, from whichever secret has them. */}}
{{- define "quire.redisCredentials" -}}
{{- $external := .Values.externalRedis -}}
{{- $secret := ternary (printf "%s-redis" (include "quire.fullname" .)) $external.existingSecret .Values.redis.enabled -}}
{{- $keys := ternary (list "username" "password") (list $external.usernameKey $external.passwordKey) .Values.redis.enabled -}}
{{- if $secret -}}
{{- with first $keys }}
- name: QUIRE_REDIS_USERNAME
  valueFrom:
    secretKeyRef: {name: {{ $secret }}, key: {{ . }}}
{{- end }}
- name: QUIRE_REDIS_PASSWORD
  valueFrom:
    secretKeyRef: {name: {{ $secret }}, key: {{ last $keys }}}
{{- end -}}
{{- end -}}

{{/* Takes a list: root, component, values. */}}
{{- define "quire.disruptionBudget" -}}
{{- $component := list (first .) (index . 1) -}}
{{- if (last .).enabled }}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  {{- include "quire.metadata" $component | nindent 2 }}
spec:
  maxUnavailable: {{ (last .).maxUnavailable }}
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels:
      {{- include "quire.selector" $component | nindent 6 }}
{{- end }}
{{- end -}}
