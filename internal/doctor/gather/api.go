package gather

import (
	"context"
	"fmt"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/beezy-dev/kleidi/internal/doctor"
	"github.com/beezy-dev/kleidi/seal/store/kube"
)

// api asks the kube-apiserver of a kubeconfig for its version and its metrics.
func api(ctx context.Context, kubeconfig, provider string) doctor.Known[doctor.API] {
	if kubeconfig == "" {
		return doctor.Known[doctor.API]{Why: "there is no administrator's kubeconfig on this node; name one with --kubeconfig"}
	}
	c, err := kube.NewClient(kube.Options{Kubeconfig: kubeconfig})
	if err != nil {
		return known(doctor.API{}, err)
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var version struct {
		GitVersion string `json:"gitVersion"`
	}
	if err := c.Do(ctx, http.MethodGet, "/version", "", nil, &version); err != nil {
		return known(doctor.API{}, fmt.Errorf("kube-apiserver does not answer: %w", err))
	}
	m := doctor.Metrics{Calls: map[string]float64{}}
	err = c.Lines(ctx, "/metrics", func(line string) { addMetric(&m, line, provider) })
	return known(doctor.API{Version: version.GitVersion, Metrics: known(m, err)}, nil)
}

var (
	metricLine = regexp.MustCompile(`^apiserver_(en[a-z_]+)\{(.*)\} (\S+)$`)
	label      = regexp.MustCompile(`([a-z_]+)="([^"]*)"`)
)

// addMetric adds a line of kube-apiserver's metrics, if the line is about the provider.
func addMetric(m *doctor.Metrics, line, provider string) {
	parts := metricLine.FindStringSubmatch(line)
	if parts == nil {
		return
	}
	labels := map[string]string{}
	for _, l := range label.FindAllStringSubmatch(parts[2], -1) {
		labels[l[1]] = l[2]
	}
	value, err := strconv.ParseFloat(parts[3], 64)
	if name := strings.TrimPrefix(parts[1], "envelope_encryption_"); err == nil && labels["provider_name"] == provider {
		switch name {
		case "kms_operations_latency_seconds_count":
			m.Calls[labels["grpc_status_code"]] += value
		case "key_id_hash_status_last_timestamp_seconds":
			if at := time.Unix(int64(value), 0); at.After(m.Status) {
				m.Status = at
			}
		case "invalid_key_id_from_status_total":
			m.Invalid += value
		}
	}
	if parts[1] == "encryption_config_controller_last_config_info" {
		m.ConfigHash = labels["hash"]
	}
}
