package gather

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/doctor"
)

// TestMetrics parses lines in the form of kube-apiserver 1.37.
func TestMetrics(t *testing.T) {
	m := doctor.Metrics{Calls: map[string]float64{}}
	for line := range strings.Lines(`# TYPE apiserver_envelope_encryption_kms_operations_latency_seconds histogram
apiserver_envelope_encryption_kms_operations_latency_seconds_bucket{grpc_status_code="OK",method_name="/v2.KeyManagementService/Encrypt",provider_name="kleidi",le="0.1"} 9
apiserver_envelope_encryption_kms_operations_latency_seconds_count{grpc_status_code="OK",method_name="/v2.KeyManagementService/Encrypt",provider_name="kleidi"} 2
apiserver_envelope_encryption_kms_operations_latency_seconds_count{grpc_status_code="OK",method_name="/v2.KeyManagementService/Status",provider_name="kleidi"} 1
apiserver_envelope_encryption_kms_operations_latency_seconds_count{grpc_status_code="Unavailable",method_name="/v2.KeyManagementService/Status",provider_name="kleidi"} 4
apiserver_envelope_encryption_kms_operations_latency_seconds_count{grpc_status_code="OK",method_name="/v2.KeyManagementService/Status",provider_name="other"} 8
apiserver_envelope_encryption_key_id_hash_status_last_timestamp_seconds{apiserver_id_hash="sha256:1",key_id_hash="sha256:2",provider_name="kleidi"} 1.793e+09
apiserver_envelope_encryption_key_id_hash_status_last_timestamp_seconds{apiserver_id_hash="sha256:1",key_id_hash="sha256:3",provider_name="kleidi"} 1.792e+09
apiserver_envelope_encryption_invalid_key_id_from_status_total{error="empty",provider_name="kleidi"} 5
apiserver_encryption_config_controller_last_config_info{apiserver_id_hash="sha256:1",hash="sha256:4"} 1
`) {
		addMetric(&m, strings.TrimSuffix(line, "\n"), "kleidi")
	}
	if m.Calls["OK"] != 3 || m.Calls["Unavailable"] != 4 || !m.Status.Equal(time.Unix(1793000000, 0)) || m.Invalid != 5 || m.ConfigHash != "sha256:4" {
		t.Errorf("%+v", m)
	}
}

// TestProcess: this test's own process listens on the socket.
func TestProcess(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	if p := process(socket); p.Value != nil || p.Why == "" {
		t.Errorf("nobody listens: %+v", p)
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if p := process(socket); p.Value == nil || p.Value.PID != os.Getpid() || p.Value.UID != os.Geteuid() || p.Value.MaxCore == "" {
		t.Errorf("%+v, %s", p.Value, p.Why)
	}
}

// TestWithoutAnything: a machine without a TPM, a serve or a kubeconfig yields reasons,
// and nothing is written.
func TestWithoutAnything(t *testing.T) {
	dir := t.TempDir()
	n := &doctor.Node{Config: config.Default()}
	n.Config.State.Dir, n.Config.Admin.Socket = filepath.Join(dir, "state"), filepath.Join(dir, "admin.sock")
	n.Config.TPM.Device, n.Config.TPM.EventLog = "unix:"+filepath.Join(dir, "tpm.sock"), filepath.Join(dir, "log")
	if err := Into(t.Context(), n, ""); err != nil {
		t.Fatal(err)
	}
	if n.Serving || n.TPM.Why == "" || n.Boot.Value == nil || n.Boot.Value.LogProblem == "" || n.API.Why == "" || n.Nodes.Why == "" || n.Disk.Value == nil || n.Disk.Value.Free == 0 {
		t.Errorf("%+v", n)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("%v, %v", left, err)
	}
}
