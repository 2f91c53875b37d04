{{/* Pods of the release as peers of a policy. Takes a list: root, components. */}}
{{- define "quire.peers" -}}
{{- range rest . }}
- podSelector:
    matchLabels:
      {{- include "quire.selector" (list (first $) .) | nindent 6 }}
{{- end }}
{{- end -}}

{{/* Who may see health and metrics. Takes a dict: values, health, metrics. */}}
{{- define "quire.observers" -}}
- ports: [{port: {{ .health }}}]
  {{- with .values.healthFrom }}
  from:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- with .values.metricsFrom }}
- from:
    {{- toYaml . | nindent 4 }}
  ports: [{port: {{ $.metrics }}}]
{{- end }}
{{- end -}}

{{/* Policies see the port of the pod that answers, which on OpenShift is 5353. */}}
{{- define "quire.dns" -}}
- ports:
    {{- range list 53 5353 }}
    - {port: {{ . }}, protocol: UDP}
    - {port: {{ . }}, protocol: TCP}
    {{- end }}
  {{- with .dnsTo }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}
