package alerts

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/rulefmt"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/promql/promqltest"
	"github.com/prometheus/prometheus/rules"
)

const (
	deploy   = "../../deploy/"
	ofNode   = deploy + "prometheus-rules.yaml"
	verifier = deploy + "prometheus-rules-verifier.yaml"
)

// healthy are the series of a healthy node, two minutes apart, by name and further labels.
var healthy = map[string]string{
	`kleidi_open{}`:    "1x90",
	`kleidi_problem{}`: "0x90",
	`up{job="kleidi"}`: "1x90",
	`kleidi_kms_operations_total{method="Decrypt", code="OK"}`:                    "0+40x90",
	`kleidi_kms_operations_total{method="Decrypt", code="NotFound"}`:              "0x90",
	`kleidi_kms_operations_total{method="Decrypt", code="DataLoss"}`:              "0x90",
	`kleidi_kms_operations_total{method="Decrypt", code="InvalidArgument"}`:       "0x90",
	`kleidi_kms_operations_total{method="Status", code="PermissionDenied"}`:       "0x90",
	`kleidi_kms_operation_duration_seconds_bucket{method="Decrypt", le="0.0025"}`: "0+40x90",
	`kleidi_kms_operation_duration_seconds_bucket{method="Decrypt", le="0.01"}`:   "0+40x90",
	`kleidi_kms_operation_duration_seconds_bucket{method="Decrypt", le="0.1"}`:    "0+40x90",
	`kleidi_kms_operation_duration_seconds_bucket{method="Decrypt", le="+Inf"}`:   "0+40x90",
	`kleidi_kek_created_timestamp_seconds{}`:                                      "0x90",
	`kleidi_suspended{}`:                                                          "0x90",
	`kleidi_slots_changed_outside{}`:                                              "0x90",
	`kleidi_tpm_open_to_others{}`:                                                 "0x90",
	`kleidi_unrevoked_copies{}`:                                                   "0x90",
	`kleidi_fallback{}`:                                                           "0x90",
	`kleidi_self_test_failed_slots{}`:                                             "0x90",
	`kleidi_keks{role="current"}`:                                                 "1x90",
	`kleidi_keks{role="retired"}`:                                                 "191x90",
	`kleidi_cluster_certificate_end_timestamp_seconds{}`:                          "31536000x90",
	`kleidi_fork{}`:                                               "0x90",
	`kleidi_replica_up{}`:                                         "1x90",
	`kleidi_node_behind{node="cp2"}`:                              "0x90",
	`kleidi_rotation_waiting{node="cp2"}`:                         "0x90",
	`up{job="kleidi-verifier"}`:                                   "1x90",
	`kleidi_verifier_audit_failures_total{}`:                      "0x90",
	`kleidi_verifier_reload_failed{}`:                             "0x90",
	`kleidi_verifier_exchanges_total{outcome="accepted"}`:         "0+1x90",
	`kleidi_verifier_exchanges_total{outcome="refused"}`:          "0x90",
	`kleidi_verifier_connections_dropped_total{reason="crowded"}`: "0+10x90",
}

// faults lists the alerts. Each has the series of a node that has the fault from minute 20
// on, or from 22 where only a difference shows it, and the minute at which the alert fires:
// a rule with a duration fires when that has passed.
var faults = []struct {
	alert  string
	series map[string]string
	fires  int
}{
	{"KleidiLocked", map[string]string{`kleidi_open{}`: "1x9 0x80"}, 22},
	{"KleidiDown", map[string]string{`up{job="kleidi"}`: "1x9 0x80"}, 22},
	{"KleidiReloadFailed", map[string]string{`kleidi_problem{}`: "0x9 1x80"}, 30},
	{"KleidiUnknownKeyID", map[string]string{`kleidi_kms_operations_total{method="Decrypt", code="NotFound"}`: "0x9 1x80"}, 20},
	{"KleidiCiphertextDamaged", map[string]string{`kleidi_kms_operations_total{method="Decrypt", code="DataLoss"}`: "0x9 1x80"}, 20},
	{"KleidiCiphertextDamaged", map[string]string{`kleidi_kms_operations_total{method="Decrypt", code="InvalidArgument"}`: "0x9 1x80"}, 20},
	{"KleidiStrangerOnSocket", map[string]string{`kleidi_kms_operations_total{method="Status", code="PermissionDenied"}`: "0x9 1x80"}, 20},
	{"KleidiSlow", map[string]string{
		`kleidi_kms_operation_duration_seconds_bucket{method="Decrypt", le="0.0025"}`: "0+40x9 400x80",
		`kleidi_kms_operation_duration_seconds_bucket{method="Decrypt", le="0.01"}`:   "0+40x9 400x80",
	}, 32},
	{"KleidiKEKOld", map[string]string{`kleidi_kek_created_timestamp_seconds{}`: "-34558800x90"}, 22},
	{"KleidiSuspended", map[string]string{`kleidi_suspended{}`: "0x9 1x80"}, 80},
	{"KleidiChangedOutside", map[string]string{`kleidi_slots_changed_outside{}`: "0x9 1x80"}, 20},
	{"KleidiTPMOpenToOthers", map[string]string{`kleidi_tpm_open_to_others{}`: "0x9 1x80"}, 30},
	{"KleidiNotRevoked", map[string]string{`kleidi_unrevoked_copies{}`: "0x9 1x80"}, 80},
	{"KleidiFallback", map[string]string{`kleidi_fallback{}`: "0x9 1x80"}, 20},
	{"KleidiSlotRotten", map[string]string{`kleidi_self_test_failed_slots{}`: "0x9 1x80"}, 20},
	{"KleidiManyRetiredKEKs", map[string]string{`kleidi_keks{role="retired"}`: "191x9 192x80"}, 20},
	{"KleidiClusterCertificateEnds", map[string]string{`kleidi_cluster_certificate_end_timestamp_seconds{}`: "31536000x9 1209600x80"}, 80},
	{"KleidiFork", map[string]string{`kleidi_fork{}`: "0x9 1x80"}, 20},
	{"KleidiReplicaDown", map[string]string{`kleidi_replica_up{}`: "1x9 0x80"}, 36},
	{"KleidiNodeBehind", map[string]string{`kleidi_node_behind{node="cp2"}`: "0x9 1x80"}, 36},
	{"KleidiRotationWaiting", map[string]string{`kleidi_rotation_waiting{node="cp2"}`: "0x9 1x80"}, 50},
	{"KleidiVerifierDown", map[string]string{`up{job="kleidi-verifier"}`: "1x9 0x80"}, 22},
	{"KleidiVerifierAuditFails", map[string]string{`kleidi_verifier_audit_failures_total{}`: "0x9 1x80"}, 20},
	{"KleidiVerifierReloadFailed", map[string]string{`kleidi_verifier_reload_failed{}`: "0x9 1x80"}, 26},
	{"KleidiVerifierRefuses", map[string]string{`kleidi_verifier_exchanges_total{outcome="refused"}`: "0x9 1x80"}, 20},
	{"KleidiVerifierCrowded", map[string]string{`kleidi_verifier_connections_dropped_total{reason="crowded"}`: "0+10x9 100+60x80"}, 22},
}

// firing returns the minute at which each alert first fires.
func firing(t *testing.T, fault map[string]string) map[string]int {
	t.Helper()
	series := maps.Clone(healthy)
	for name, values := range fault {
		if _, ok := series[name]; !ok {
			t.Fatalf("no healthy node has %s", name)
		}
		series[name] = values
	}
	var load strings.Builder
	load.WriteString("load 2m\n")
	for _, name := range slices.Sorted(maps.Keys(series)) {
		labelled := strings.Replace(name, "{", `{instance="cp1", `, 1)
		fmt.Fprintf(&load, "  %s %s\n", strings.Replace(labelled, ", }", "}", 1), series[name])
	}
	storage := promqltest.LoadedStorage(t, load.String())
	defer storage.Close()
	query := rules.EngineQueryFunc(promqltest.NewTestEngine(t, false, 5*time.Minute, 1_000_000), storage)
	first := map[string]int{}
	for _, rule := range read(t) {
		for minute := 0; minute < 170; minute += 2 {
			if _, err := rule.Eval(t.Context(), 0, time.Unix(int64(minute)*60, 0), query, nil, 0); err != nil {
				t.Fatalf("%s: %v", rule.Name(), err)
			}
			alerts := slices.DeleteFunc(rule.ActiveAlerts(), func(a *rules.Alert) bool { return a.State != rules.StateFiring })
			if len(alerts) == 0 {
				continue
			}
			first[rule.Name()] = minute
			for _, a := range alerts {
				a.Annotations.Range(func(l labels.Label) {
					if l.Value == "" || strings.Contains(l.Value, "<error") || strings.Contains(l.Value, "<no value>") {
						t.Errorf("%s: %s is %q", rule.Name(), l.Name, l.Value)
					}
				})
			}
			break
		}
	}
	return first
}

// read returns all rules, as Prometheus reads them.
func read(t *testing.T) (all []*rules.AlertingRule) {
	t.Helper()
	p := parser.NewParser(parser.Options{})
	for _, file := range []string{ofNode, verifier} {
		groups, errs := rulefmt.ParseFile(file, false, model.UTF8Validation, p, slog.New(slog.DiscardHandler))
		if len(errs) > 0 {
			t.Fatal(errs)
		}
		for _, g := range groups.Groups {
			for _, r := range g.Rules {
				expr, err := p.ParseExpr(r.Expr)
				if err != nil {
					t.Fatalf("%s: %v", r.Alert, err)
				}
				all = append(all, rules.NewAlertingRule(r.Alert, expr, time.Duration(r.For), time.Duration(r.KeepFiringFor),
					labels.FromMap(r.Labels), labels.FromMap(r.Annotations), labels.EmptyLabels(), "", true, slog.New(slog.DiscardHandler)))
			}
		}
	}
	return all
}

// TestHealthy: nothing fires on a healthy node.
func TestHealthy(t *testing.T) {
	if fires := firing(t, nil); len(fires) > 0 {
		t.Errorf("on a healthy node: %v", fires)
	}
}

// TestAlerts: each fault fires its alert, at the right minute, and no other one.
func TestAlerts(t *testing.T) {
	tested := map[string]bool{}
	for _, f := range faults {
		tested[f.alert] = true
		t.Run(f.alert, func(t *testing.T) {
			if got, want := firing(t, f.series), map[string]int{f.alert: f.fires}; !maps.Equal(got, want) {
				t.Errorf("fires %v, want %v", got, want)
			}
		})
	}
	for _, r := range read(t) {
		if !tested[r.Name()] {
			t.Errorf("%s: no fault fires it in this test", r.Name())
		}
	}
}

// TestDashboard: Prometheus parses each expression of the dashboard, and a healthy node
// gives it a value.
func TestDashboard(t *testing.T) {
	b, err := os.ReadFile(deploy + "helm/kleidi/files/dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	var board struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(b, &board); err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, panel := range board.Panels {
		for _, target := range panel.Targets {
			n++
			expr := strings.NewReplacer("$__rate_interval", "10m", "$__interval", "2m", "$__range", "1h").Replace(target.Expr)
			if _, err := parser.NewParser(parser.Options{}).ParseExpr(expr); err != nil {
				t.Errorf("%s: %v", panel.Title, err)
			}
		}
	}
	if n == 0 {
		t.Error("the dashboard has no expressions")
	}
}
