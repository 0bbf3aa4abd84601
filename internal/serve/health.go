package serve

import (
	"context"
	"crypto/sha256"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/grpcserver/monitor"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/rollout"
	"github.com/beezy-dev/kleidi/internal/slots"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/internal/status"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/unlock"
	"github.com/beezy-dev/kleidi/tpm"
)

// health is serve's report about itself: /livez, /readyz and /metrics.
type health struct {
	registry *prometheus.Registry
	attempts *prometheus.CounterVec

	mu       sync.Mutex
	node     *node.Node
	kmsError error // the reason why the KMS socket does not listen
}

func (h *health) bind(n *node.Node) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.node = n
}

func (h *health) setKMS(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.kmsError = err
}

func (h *health) attempted(cause seal.Cause, _ unlock.Timing) {
	label, status := "none", "STATUS=open"
	if cause != "" {
		label, status = string(cause), "STATUS=last attempt to unlock failed: "+string(cause)
	}
	h.attempts.WithLabelValues(label).Inc()
	_, _ = daemon.SdNotify(false, status)
}

func (h *health) handler() http.Handler {
	return monitor.Handler(h.registry, h.ready, h.remarks)
}

// ready returns nil if kube-apiserver's calls succeed.
func (h *health) ready() error {
	h.mu.Lock()
	kmsError, n := h.kmsError, h.node
	h.mu.Unlock()
	if kmsError != nil {
		return fmt.Errorf("KMS socket: %w", kmsError)
	}
	if _, err := n.Unlocker.Keyring(); err != nil {
		return fmt.Errorf("locked: %s: %w", seal.CauseOf(err), err)
	}
	if n.Replica != nil {
		if err := n.Replica.State().Problem; seal.CauseOf(err) == seal.CauseNodeRemoved {
			return fmt.Errorf("removed: %w", err)
		}
	}
	return nil
}

// remarks lists what to repair although all calls succeed.
func (h *health) remarks() []string {
	h.mu.Lock()
	n := h.node
	h.mu.Unlock()
	k, err := n.Unlocker.Keyring()
	if err != nil {
		return nil
	}
	var remarks []string
	if n.Replica != nil {
		if err := n.Replica.State().Problem; err != nil {
			remarks = append(remarks, fmt.Sprintf("cluster store: %s", err))
		}
		if a := n.Access.State(); a.Problem != nil {
			remarks = append(remarks, fmt.Sprintf("the client certificate for the cluster store ends at %s: %s", a.NotAfter.Format(time.RFC3339), a.Problem))
		}
	}
	if s := status.Suspension(n, k.Slots()); s != nil {
		remarks = append(remarks, "suspended: "+s.String())
	}
	for _, d := range n.View.Debts(k.Slots()) {
		remarks = append(remarks, "not revoked: kept copies of former slots "+d.Describe())
	}
	for _, c := range n.Slots.Outside(context.Background(), k.ClusterID().String(), k.Slots()).Describe() {
		remarks = append(remarks, "changed from outside: "+c)
	}
	if state := n.Unlocker.State(); state.Fallback != nil {
		remarks = append(remarks, fmt.Sprintf("fallback: opened by %s, since: %s", state.Wrapper, state.Fallback))
	}
	for _, t := range slots.Unusable(n, k) {
		remarks = append(remarks, fmt.Sprintf("self-test: slot %s does not open: %s", t.Name, t.Problem.Err()))
	}
	return remarks
}

// Describe implements prometheus.Collector.
func (h *health) Describe(c chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descOpenTPM, descSuspended, descUnrevoked, descOutside, descFallback, descUnusable, descTested, descOpen, descKeyID, descRevision, descKEKs, descKEKMade, descSlotMade, descAttested, descPassed, descProblem, descStep, descClientEnd, descNodes, descNodeBehind, descRotationWaiting, descReplicaUp, descFork} {
		c <- d
	}
}

// setGauge sends the value of a gauge.
type setGauge func(d *prometheus.Desc, v float64, labels ...string)

// flag sends 1 if something is so, and 0 else.
func (set setGauge) flag(d *prometheus.Desc, is bool) {
	v := 0.0
	if is {
		v = 1
	}
	set(d, v)
}

// Collect implements prometheus.Collector: it reads memory, and checks who may open the
// TPM's device.
func (h *health) Collect(c chan<- prometheus.Metric) {
	h.mu.Lock()
	n := h.node
	h.mu.Unlock()
	if n == nil {
		return
	}
	gauge := setGauge(func(d *prometheus.Desc, v float64, labels ...string) {
		c <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	})
	collectMachine(n, gauge)
	k, err := n.Unlocker.Keyring()
	gauge.flag(descOpen, err == nil)
	if err == nil {
		collectKeyring(n, k, gauge)
		collectCluster(n, k, gauge)
	}
}

// collectMachine collects what is known even while the keyring is locked.
func collectMachine(n *node.Node, gauge setGauge) {
	gauge.flag(descOpenTPM, n.TPMOpenTo() != "")
	state := n.Unlocker.State()
	for step, d := range map[string]time.Duration{"load": state.Timing.Load, "gate": state.Timing.Gate, "slots": state.Timing.Slots, "total": state.Timing.Total} {
		gauge(descStep, d.Seconds(), step)
	}
	if last := n.Gate.Last(); last != nil {
		gauge(descAttested, node.Seconds(last.Time))
	}
	clientEnd := 0.0
	if end := n.Access.State().NotAfter; !end.IsZero() {
		clientEnd = node.Seconds(end)
	}
	gauge(descClientEnd, clientEnd)
	gauge.flag(descProblem, state.Problem != nil)
	gauge.flag(descPassed, n.Gate.Passed())
}

// collectKeyring collects what the open keyring says of its KEKs and slots.
func collectKeyring(n *node.Node, k *keyring.Keyring, gauge setGauge) {
	info := k.Info()
	gauge.flag(descSuspended, status.Suspension(n, k.Slots()) != nil)
	gauge.flag(descFallback, n.Unlocker.State().Fallback != nil)
	gauge(descUnrevoked, float64(len(n.View.Debts(k.Slots()))))
	gauge(descOutside, float64(len(n.Slots.Outside(context.Background(), k.ClusterID().String(), k.Slots()).IDs())))
	gauge(descTested, n.SelfTests.Seconds())
	gauge(descUnusable, float64(len(slots.Unusable(n, k))))
	gauge(descKeyID, 1, fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(info.Current.KeyID))))
	gauge(descRevision, float64(info.Revision))
	gauge(descNodes, float64(len(info.Nodes)))
	gauge(descKEKs, 1, "current")
	gauge(descKEKs, float64(len(info.Retired)), "retired")
	gauge(descKEKMade, node.Seconds(info.Current.Created))
	seen := map[[2]string]bool{} // a duplicate series would fail the whole scrape
	for _, s := range k.Slots() {
		if seen[[2]string{s.Type, s.Node}] {
			continue
		}
		seen[[2]string{s.Type, s.Node}] = true
		if part := slotview.TPMPart(s); part.Type == seal.TypeTPM { // other slots don't record when they were made
			if d, err := tpm.DemandOf(part, n.Gate.Counter); err == nil {
				gauge(descSlotMade, node.Seconds(d.Made), s.Type, s.Node)
			}
		}
	}
}

// collectCluster collects this node's knowledge of the cluster store and of the other nodes.
func collectCluster(n *node.Node, k *keyring.Keyring, gauge setGauge) {
	c := rollout.Cluster(n, k)
	if c == nil {
		return
	}
	number := map[bool]float64{true: 1}
	state := n.Replica.State()
	gauge(descReplicaUp, number[rollout.StoreUp(state)])
	gauge(descFork, number[rollout.Forked(state)])
	among := func(all []admin.WaitingNode, name string) float64 {
		return number[slices.ContainsFunc(all, func(w admin.WaitingNode) bool { return w.Node == name })]
	}
	for _, entry := range k.Nodes() {
		gauge(descNodeBehind, among(c.Behind, entry.Name), entry.Name)
		gauge(descRotationWaiting, among(c.Rotation.Waiting, entry.Name), entry.Name)
	}
}

func newHealth(registry *prometheus.Registry) *health {
	h := &health{registry: registry, attempts: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "kleidi_unlock_attempts_total", Help: "Attempts to unlock or reload the keyring, by the cause of their failure; none for success.",
	}, []string{"cause"})}
	h.kmsError = seal.Errorf(seal.CauseStarting, "wait a moment", "the KMS socket does not listen yet")
	h.attempts.WithLabelValues("none")
	for _, c := range seal.Causes() { // so that a rate sees the first failure of each
		h.attempts.WithLabelValues(string(c))
	}
	registry.MustRegister(h.attempts, h, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return h
}

var (
	descSuspended = prometheus.NewDesc("kleidi_suspended", "1 if a suspension lets boots other than the sealed ones open, 0 else; kleidi reseal ends it.", nil, nil)
	descUnrevoked = prometheus.NewDesc("kleidi_unrevoked_copies", "TPMs and epoch counters under which kept copies of former slots still open; kleidi status names them.", nil, nil)
	descOutside   = prometheus.NewDesc("kleidi_slots_changed_outside", "Boot states, token keys and recovery recipients that were added to or removed from the keyring, but not by a command on this node; kleidi status names them.", nil, nil)
	descOpenTPM   = prometheus.NewDesc("kleidi_tpm_open_to_others", "1 if users other than root and kleidi's own may use the TPM, 0 else; kleidi status names them.", nil, nil)
	descFallback  = prometheus.NewDesc("kleidi_fallback", "1 if a wrapper other than the first of unlock.order opened the keyring, 0 else.", nil, nil)
	descUnusable  = prometheus.NewDesc("kleidi_self_test_failed_slots", "Slots of pkcs11, vault and kms-plugin that did not open when they were last tested, those that a rotation left out, and wrappers of unlock.order without a slot.", nil, nil)
	descTested    = prometheus.NewDesc("kleidi_self_test_timestamp_seconds", "When the slots of pkcs11, vault and kms-plugin were last opened to check that they still open; 0 if never.", nil, nil)
	descOpen      = prometheus.NewDesc("kleidi_open", "1 if the KEK is open, 0 if kleidi is locked.", nil, nil)
	descKeyID     = prometheus.NewDesc("kleidi_current_key_id_info", "The current key ID's hash, in the form of kube-apiserver's key_id_hash.", []string{"key_id_hash"}, nil)
	descRevision  = prometheus.NewDesc("kleidi_keyring_revision", "Revision of the open keyring.", nil, nil)
	descKEKs      = prometheus.NewDesc("kleidi_keks", "KEKs in the open keyring, by role.", []string{"role"}, nil)
	descKEKMade   = prometheus.NewDesc("kleidi_kek_created_timestamp_seconds", "When the current KEK was made.", nil, nil)
	descSlotMade  = prometheus.NewDesc("kleidi_slot_created_timestamp_seconds", "When a slot of the TPM, alone or with another wrapper, was made; the others don't record it.", []string{"type", "node"}, nil)
	descAttested  = prometheus.NewDesc("kleidi_attestation_timestamp_seconds", "When evidence of this boot last verified.", nil, nil)
	descPassed    = prometheus.NewDesc("kleidi_attestation_passed", "1 if the last attestation of this boot verified, 0 if it failed or there was none.", nil, nil)
	descProblem   = prometheus.NewDesc("kleidi_problem", "1 if the last attempt to unlock or reload, or to end an epoch, failed; kleidi status says why.", nil, nil)
	descClientEnd = prometheus.NewDesc("kleidi_cluster_certificate_end_timestamp_seconds", "When the client certificate for the cluster store ends; 0 if there is none.", nil, nil)
	descStep      = prometheus.NewDesc("kleidi_unlock_duration_seconds", "How long the steps of the last attempt to unlock took.", []string{"step"}, nil)
)

// What the cluster store says.
var (
	descNodes           = prometheus.NewDesc("kleidi_nodes", "Nodes of the open keyring.", nil, nil)
	descReplicaUp       = prometheus.NewDesc("kleidi_replica_up", "1 if the cluster store answered at the last read, 0 else.", nil, nil)
	descFork            = prometheus.NewDesc("kleidi_fork", "1 if the keyring in the cluster store and this node's are a fork: neither follows the other.", nil, nil)
	descNodeBehind      = prometheus.NewDesc("kleidi_node_behind", "1 if a node has not followed the present keyring, by its last record in the cluster store.", []string{"node"}, nil)
	descRotationWaiting = prometheus.NewDesc("kleidi_rotation_waiting", "1 if a rotation waits for a node; kleidi status says for what.", []string{"node"}, nil)
)
