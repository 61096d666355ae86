{{/*
One kind of worker: its Deployment and its headless Service. Given: root, role, own (its values), port, kvRole, file,
wait (seconds that preStop waits for requests that need it) and ports (beside HTTP).
*/}}
{{- define "kvbelt.worker" -}}
{{- $name := printf "vllm-%s" .role }}
{{- $values := .root.Values }}
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ $name }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    app: {{ $name }}
    {{- include "kvbelt.releaseLabels" .root | nindent 4 }}
spec:
  {{- if eq $values.autoscaling.kind "none" }}
  replicas: {{ .own.replicas }}
  {{- end }}
  selector:
    matchLabels:
      app: {{ $name }}
  # There is rarely a GPU for a surplus worker: a worker ends before its successor starts.
  strategy:
    type: RollingUpdate
    rollingUpdate:
      maxSurge: 0
      maxUnavailable: 1
  template:
    metadata:
      labels:
        app: {{ $name }}
        {{- include "kvbelt.labels" .root | nindent 8 }}
      annotations:
        # A changed configuration replaces the workers one after another.
        checksum/config: {{ include (print .root.Template.BasePath "/configmaps.yaml") .root | sha256sum }}
    spec:
      runtimeClassName: {{ $values.runtimeClassName }}
      automountServiceAccountToken: false
      enableServiceLinks: false
      terminationGracePeriodSeconds: {{ add .wait 30 }}
      securityContext:
        {{- include "kvbelt.podSecurity" .root | nindent 8 }}
        fsGroupChangePolicy: OnRootMismatch
      {{- if $values.rdma.enabled }}
      topologySpreadConstraints:
        - maxSkew: 1
          topologyKey: kubernetes.io/hostname
          whenUnsatisfiable: ScheduleAnyway
          labelSelector:
            matchLabels:
              app.kubernetes.io/part-of: kvbelt
      {{- end }}
      {{- with .own.nodeSelector }}
      nodeSelector:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with .own.tolerations }}
      tolerations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      containers:
        - name: {{ $name }}
          image: {{ $values.image.worker }}
          command: ["vllm", "serve"]
          args:
            - $(MODEL)
            - --host=0.0.0.0
            - --port={{ .port }}
            - --max-model-len=$(MAX_MODEL_LEN)
            - --gpu-memory-utilization=$(GPU_MEMORY_UTILIZATION)
            {{- if gt (int .own.gpus) 1 }}
            - --tensor-parallel-size={{ .own.gpus }}
            {{- end }}
            - --kv-transfer-config
            - '{"kv_connector": "KVBeltConnector", "kv_connector_module_path": "kvbelt.vllm", "kv_role": "{{ .kvRole }}"}'
            {{- range .own.extraArgs }}
            - {{ . | quote }}
            {{- end }}
          envFrom:
            - configMapRef:
                name: kvbelt-model
          env:
            - name: LMCACHE_CONFIG_FILE
              value: "/etc/lmcache/{{ .file }}"
            - name: PYTHONHASHSEED
              value: "0"
            - name: POD_IP
              valueFrom:
                fieldRef:
                  fieldPath: status.podIP
            - name: UCX_TLS
              value: {{ ternary "rc,cuda_ipc,cuda_copy,tcp" "cuda_ipc,cuda_copy,tcp" $values.rdma.enabled | quote }}
            - name: UCX_TCP_PORT_RANGE
              value: "7600-7699"
            - name: HOME
              value: "/home/kvbelt"
            - name: HF_HOME
              value: "/models"
            - name: VLLM_NO_USAGE_STATS
              value: "1"
            - name: HF_TOKEN
              valueFrom:
                secretKeyRef:
                  name: hf-token
                  key: token
                  optional: true
            - name: KVBELT_ADMIN_KEY_FILE
              value: "/etc/kvbelt/admin/admin.key"
          ports:
            - name: http
              containerPort: {{ .port }}
            {{- range .ports }}
            - name: {{ .name }}
              containerPort: {{ .port }}
            {{- end }}
          # Loading a model may take half an hour, the download included.
          startupProbe:
            httpGet: {path: /health, port: http}
            periodSeconds: 10
            timeoutSeconds: 5
            failureThreshold: 180
          # 200 from when the model is loaded and the belt's sockets listen: a handshake is possible from then on.
          readinessProbe:
            httpGet: {path: /health, port: http}
            periodSeconds: 5
            timeoutSeconds: 5
            failureThreshold: 3
          # Not /health: it says 503 while a worker drains. The limits are long, because a busy worker is slow, not dead.
          livenessProbe:
            httpGet: {path: /v1/models, port: http}
            periodSeconds: 30
            timeoutSeconds: 30
            failureThreshold: 5
            terminationGracePeriodSeconds: 60
          lifecycle:
            # A container that was started again in the same Pod is still drained, as its predecessor was.
            postStart:
              exec:
                command:
                  - sh
                  - -c
                  - >-
                    kvbelt workers --proxy http://kvbelt-proxy-control:9100 undrain "$POD_IP:{{ .port }}" --role {{ .role }} || true
            # Takes no new requests, and ends when no running request needs it.
            preStop:
              exec:
                command:
                  - sh
                  - -c
                  - >-
                    kvbelt workers --proxy http://kvbelt-proxy-control:9100 drain "$POD_IP:{{ .port }}" --role {{ .role }} --wait {{ .wait }}
          resources:
            requests:
              {{- toYaml .own.resources.requests | nindent 14 }}
            limits:
              {{- toYaml .own.resources.limits | nindent 14 }}
              {{ .own.gpuResource }}: {{ .own.gpus | quote }}
              {{- if $values.rdma.enabled }}
              {{ $values.rdma.resource }}: "1"
              {{- end }}
          securityContext:
            allowPrivilegeEscalation: false
            readOnlyRootFilesystem: true
            capabilities:
              drop: ["ALL"]
              {{- if $values.rdma.enabled }}
              # Memory that a network card reads must stay where it is.
              add: [IPC_LOCK]
              {{- end }}
          volumeMounts:
            - {name: config, mountPath: /etc/lmcache, readOnly: true}
            - {name: keys, mountPath: /etc/kvbelt/keys, readOnly: true}
            - {name: trusted, mountPath: /etc/kvbelt/trusted, readOnly: true}
            - {name: admin, mountPath: /etc/kvbelt/admin, readOnly: true}
            - {name: models, mountPath: /models}
            - {name: home, mountPath: /home/kvbelt}
            - {name: tmp, mountPath: /tmp}
            - {name: shm, mountPath: /dev/shm}
      volumes:
        - name: config
          configMap:
            name: lmcache-{{ .role }}-config
        - name: keys
          secret:
            secretName: kvbelt-{{ .role }}-key
            defaultMode: 0440
        - name: trusted
          secret:
            secretName: kvbelt-trusted-keys
            defaultMode: 0444
        - name: admin
          secret:
            secretName: kvbelt-admin-key
            defaultMode: 0440
        - name: models
          emptyDir: {}
        - name: home
          emptyDir: {}
        - name: tmp
          emptyDir: {}
        - name: shm
          emptyDir:
            medium: Memory
            sizeLimit: 8Gi
---
# Its DNS name has the address of each worker, ready or not. The proxy looks them up and asks each for its health.
apiVersion: v1
kind: Service
metadata:
  name: {{ $name }}
  namespace: {{ .root.Release.Namespace }}
  labels:
    app: {{ $name }}
    {{- include "kvbelt.releaseLabels" .root | nindent 4 }}
spec:
  clusterIP: None
  publishNotReadyAddresses: true
  selector:
    app: {{ $name }}
  ports:
    - name: http
      port: {{ .port }}
      targetPort: http
    {{- range .ports }}
    - name: {{ .name }}
      port: {{ .port }}
      targetPort: {{ .name }}
    {{- end }}
{{- end }}
