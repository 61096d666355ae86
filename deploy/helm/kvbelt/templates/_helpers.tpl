{{- define "kvbelt.labels" -}}
app.kubernetes.io/part-of: kvbelt
{{- end }}

{{- define "kvbelt.releaseLabels" -}}
{{ include "kvbelt.labels" . }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/instance: {{ .Release.Name }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{/* A Pod that runs as an ordinary user. */}}
{{- define "kvbelt.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{/* Handshakes, reservations and liveness: a port of each for each tensor-parallel rank. */}}
{{- define "kvbelt.rankPorts" -}}
{{- $ranks := int .Values.decode.gpus }}
{{- range $first := list 7300 7400 7700 }}
- port: {{ $first }}
  {{- if gt $ranks 1 }}
  endPort: {{ sub (add $first $ranks) 1 }}
  {{- end }}
  protocol: TCP
{{- end }}
{{- end }}
