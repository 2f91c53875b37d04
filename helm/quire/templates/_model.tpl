{{/* Directory of the model in a pod; empty: the demo model is served. Each revision that is fetched has one of
its own, so that engines of two revisions may share a volume. */}}
{{- define "quire.modelDirectory" -}}
{{- $model := .Values.dataPlane.model -}}
{{- if $model.hub.repository -}}
{{- clean (printf "/model/%s/%s" $model.path $model.hub.revision) -}}
{{- else if include "quire.modelClaim" . -}}
{{- clean (printf "/model/%s" $model.path) -}}
{{- end -}}
{{- end -}}

{{/* Not empty: each engine has a volume of its own to fetch the model into. */}}
{{- define "quire.modelIsOwn" -}}
{{- if and .Values.dataPlane.model.hub.repository (not (include "quire.modelClaim" .)) }}true{{ end -}}
{{- end -}}

{{/* The pod's volume with the model, unless a claim of the pod's own is it. */}}
{{- define "quire.modelVolume" -}}
{{- $hub := .Values.dataPlane.model.hub -}}
{{- if include "quire.modelIsOwn" . -}}
{{- if not $hub.claim }}
- name: model
  emptyDir:
    sizeLimit: {{ $hub.size }}
{{- end }}
{{- else if include "quire.modelClaim" . }}
- name: model
  persistentVolumeClaim:
    claimName: {{ include "quire.modelClaim" . }}
    {{- if not $hub.repository }}
    readOnly: true
    {{- end }}
{{- end }}
{{- end -}}

{{/* Fetches the model before the engine starts. It alone writes to the volume, has the token and reaches the
hub. It asks for what the engine asks for but GPUs: a pod's request is the larger of both. */}}
{{- define "quire.fetchContainer" -}}
{{- $values := .Values.dataPlane }}
{{- $hub := $values.model.hub }}
- name: fetch-model
  image: {{ include "quire.image" (dict "root" . "component" $values) }}
  imagePullPolicy: {{ $values.image.pullPolicy }}
  command:
    - python
    - -m
    - data_plane.fetch_model
    - --repository={{ $hub.repository }}
    - --revision={{ $hub.revision }}
    - --into={{ include "quire.modelDirectory" . }}
    - --log-format={{ $values.settings.log_format | default "text" }}
    {{- if include "quire.modelIsOwn" . }}
    - --sole
    {{- end }}
  env:
    - {name: HOME, value: /tmp}
    - {name: HF_HOME, value: /tmp/huggingface}
    - {name: HF_HUB_DISABLE_TELEMETRY, value: "1"}
    # /tmp has no room for a copy of what passes through.
    - {name: HF_XET_CHUNK_CACHE_SIZE_BYTES, value: "0"}
    {{- with $hub.endpoint }}
    - name: HF_ENDPOINT
      value: {{ . | quote }}
    {{- end }}
    {{- with $hub.tokenSecret }}
    - name: HF_TOKEN
      valueFrom:
        secretKeyRef: {name: {{ . }}, key: {{ $hub.tokenKey }}}
    {{- end }}
  # Its last line says why it failed; `kubectl describe pod` shows it.
  terminationMessagePolicy: FallbackToLogsOnError
  resources:
    {{- $memory := printf "%sMi" (include "quire.dataPlaneMemoryMib" .) }}
    requests:
      cpu: {{ $values.cpu | quote }}
      memory: {{ $memory }}
    limits:
      memory: {{ $memory }}
  {{- include "quire.containerSecurity" . | nindent 2 }}
  volumeMounts:
    - name: tmp
      mountPath: /tmp
    - name: model
      mountPath: /model
{{- end -}}

{{/* A claim for each engine. Kubernetes lets nobody change it: no label here may follow values or the chart's
version. Takes a list: root, name, values with size and storageClassName. */}}
{{- define "quire.claimTemplate" -}}
{{- $values := last . }}
- apiVersion: v1
  kind: PersistentVolumeClaim
  metadata:
    name: {{ index . 1 }}
    labels:
      {{- include "quire.selector" (list (first .) "data-plane") | nindent 6 }}
  spec:
    accessModes: [ReadWriteOnce]
    {{- with $values.storageClassName }}
    storageClassName: {{ . }}
    {{- end }}
    resources:
      requests:
        storage: {{ $values.size }}
{{- end -}}

{{/* Claims of each pod of an engine, which only the pod's own place has. */}}
{{- define "quire.engineClaims" -}}
{{- $values := .Values.dataPlane }}
{{- if $values.cache.claim }}
{{- include "quire.claimTemplate" (list . "cache" $values.cache) }}
{{- end }}
{{- if and (include "quire.modelIsOwn" .) $values.model.hub.claim }}
{{- include "quire.claimTemplate" (list . "model" $values.model.hub) }}
{{- end }}
{{- end -}}
