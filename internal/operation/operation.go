package operation

import (
	"context"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/carry"
	"github.com/beezy-dev/kleidi/internal/lifecycle"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/prune"
	"github.com/beezy-dev/kleidi/internal/reseal"
	"github.com/beezy-dev/kleidi/internal/rollout"
	"github.com/beezy-dev/kleidi/internal/slots"
	"github.com/beezy-dev/kleidi/internal/status"
)

// Operation is a verb with its work.
type Operation[Req, Resp any] struct {
	Verb admin.Verb[Req, Resp]
	// work does the work in the running serve.
	work func(context.Context, *node.Node, Req) (Resp, error)
	// alone does the work in a separate command, if no serve runs; nil means work.
	alone func(context.Context, *node.Node, Req) (Resp, error)
	// keyring says what the work expects of the keyring.
	keyring expectation
	// Awaits is what the work may wait for apart from devices and servers; often "".
	Awaits string
}

// expectation is what an operation expects of the keyring.
type expectation int

const (
	// asItIs: the operation opens what it needs itself, or works on a locked keyring.
	asItIs expectation = iota
	// seen: serve first waits for the end of its first attempt to unlock, because the
	// operation shows the result.
	seen
	// open: like seen; a command without serve also opens the keyring first.
	open
)

const (
	// awaitsRecords is what removing a KEK waits for in a cluster of several nodes.
	awaitsRecords = "the records of other nodes, which say under which KEK their kube-apiserver encrypts"
	// awaitsNodes is what a rotation waits for: with several nodes, their records of the
	// present keyring, and with one, the devices and servers alone.
	awaitsNodes = "the other nodes, if there are any, for a token or a server"
	awaitsStore = "the cluster store"
)

// The operations.
var (
	Status = Operation[admin.StatusRequest, admin.StatusReport]{Verb: admin.Status, work: status.Report, alone: status.Alone, keyring: seen}

	Rotate        = Operation[admin.RotateRequest, admin.KeyringState]{Verb: admin.Rotate, work: rollout.Rotate, alone: rollout.RotateAlone, keyring: open, Awaits: awaitsNodes}
	WatchRotation = Operation[admin.WatchRotationRequest, admin.KeyringState]{Verb: admin.WatchRotation, work: rollout.WatchRotation, keyring: seen, Awaits: awaitsStore}
	Recover       = Operation[admin.RecoverRequest, admin.KeyringState]{Verb: admin.Recover, work: lifecycle.Recover}
	Restore       = Operation[admin.RestoreRequest, admin.KeyringState]{Verb: admin.Restore, work: lifecycle.Restore}
	Save          = Operation[admin.SaveRequest, admin.KeyringState]{Verb: admin.Save, work: lifecycle.Save, alone: lifecycle.NothingToSave}
	Verify        = Operation[admin.VerifyRequest, admin.KeyringState]{Verb: admin.Verify, work: lifecycle.Verify}
	Prune         = Operation[admin.PruneRequest, admin.KeyringState]{Verb: admin.Prune, work: prune.Remove, alone: prune.NotRunning, keyring: seen, Awaits: awaitsRecords}
	ArchiveKEK    = Operation[admin.ArchiveRequest, admin.ArchivedKEK]{Verb: admin.ArchiveKEK, work: prune.ArchiveKEK, alone: prune.ArchiveAlone, keyring: open, Awaits: awaitsRecords}
	ImportArchive = Operation[admin.ImportArchiveRequest, admin.KeyringState]{Verb: admin.ImportArchive, work: prune.ImportArchive, keyring: open}
	Reload        = Operation[admin.ReloadRequest, admin.KeyringState]{Verb: admin.Reload, work: lifecycle.Reload}

	ExportKeyring  = Operation[admin.ExportKeyringRequest, admin.KeyringExport]{Verb: admin.ExportKeyring, work: carry.Export, keyring: open}
	ImportKeyring  = Operation[admin.ImportKeyringRequest, admin.KeyringState]{Verb: admin.ImportKeyring, work: carry.Import, keyring: open}
	PublishKeyring = Operation[admin.PublishKeyringRequest, admin.KeyringState]{Verb: admin.PublishKeyring, work: carry.Publish, keyring: open, Awaits: awaitsStore}

	Reseal           = Operation[admin.ResealRequest, admin.KeyringState]{Verb: admin.Reseal, work: resealAny, keyring: open}
	Suspend          = Operation[admin.SuspendRequest, admin.KeyringState]{Verb: admin.Suspend, work: reseal.Suspend, keyring: open}
	AddBootStates    = Operation[admin.AddBootStatesRequest, admin.KeyringState]{Verb: admin.AddBootStates, work: reseal.AddBootStates, keyring: open}
	RevokeBootStates = Operation[admin.RevokeBootStatesRequest, admin.KeyringState]{Verb: admin.RevokeBootStates, work: reseal.RevokeBootStates, keyring: open}

	AddSlot      = Operation[admin.AddSlotRequest, admin.KeyringState]{Verb: admin.AddSlot, work: slots.Add, keyring: open}
	RemoveSlot   = Operation[admin.RemoveSlotRequest, admin.KeyringState]{Verb: admin.RemoveSlot, work: slots.Remove, keyring: open}
	TestSlots    = Operation[admin.TestSlotsRequest, admin.SlotTests]{Verb: admin.TestSlots, work: slots.Test, keyring: open}
	ForgetCopies = Operation[admin.ForgetCopiesRequest, admin.KeyringState]{Verb: admin.ForgetCopies, work: slots.ForgetCopies, keyring: open}
	RewrapSlot   = Operation[admin.RewrapSlotRequest, admin.KeyringState]{Verb: admin.RewrapSlot, work: slots.Rewrap, keyring: open}
)

// table lists every operation, for serve.
var table = []interface {
	handle(*admin.Server, *node.Node)
}{
	Status,
	Rotate, WatchRotation, Recover, Restore, Save, Verify, Prune, ArchiveKEK, ImportArchive, Reload, ExportKeyring, ImportKeyring, PublishKeyring,
	Reseal, Suspend, AddBootStates, RevokeBootStates,
	AddSlot, RemoveSlot, TestSlots, RewrapSlot, ForgetCopies,
}

// Handle makes the admin socket of a running serve answer every operation.
func Handle(s *admin.Server, n *node.Node) {
	for _, o := range table {
		o.handle(s, n)
	}
}

func (o Operation[Req, Resp]) handle(s *admin.Server, n *node.Node) {
	admin.Handle(s, o.Verb, func(ctx context.Context, req Req) (Resp, error) {
		if o.keyring != asItIs {
			awaitFirstAttempt(ctx, n)
		}
		resp, err := o.work(ctx, n, req)
		return resp, n.Advise(ctx, err)
	})
}

// firstAttempt bounds how long an operation waits for the first attempt to unlock.
const firstAttempt = 2 * time.Second

// awaitFirstAttempt waits a moment for the first attempt to unlock. To systemd the unit
// is ready before that, and a command may follow at once.
func awaitFirstAttempt(ctx context.Context, n *node.Node) {
	select {
	case <-n.Unlocker.Tried():
	case <-time.After(firstAttempt):
	case <-ctx.Done():
	}
}

// Alone runs the operation in this process, if no serve runs.
func (o Operation[Req, Resp]) Alone(ctx context.Context, n *node.Node, req Req) (Resp, error) {
	work := o.alone
	if work == nil {
		work = o.work
	}
	if o.keyring == open {
		var none Resp
		if err := n.AcquireState(); err != nil {
			return none, err
		}
		if err := n.Unlocker.Unlock(ctx); err != nil {
			return none, err
		}
	}
	resp, err := work(ctx, n, req)
	return resp, n.Advise(ctx, err)
}
