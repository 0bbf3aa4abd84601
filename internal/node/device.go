package node

import (
	"context"
	"strings"

	"github.com/beezy-dev/kleidi/internal/ownership"
	"github.com/beezy-dev/kleidi/tpm/keys"
)

// TPMOpenTo says which users other than root and kleidi's own may use the TPM; "" means
// none, or unknown. With a copy of the keyring, such a user has the KEK: the TPM checks
// the boot, not which user sends the command.
func (n *Node) TPMOpenTo() string {
	device := n.Config.TPM.Device
	if !n.Attests() || strings.HasPrefix(device, "tcp:") {
		return ""
	}
	who, err := ownership.Openers(strings.TrimPrefix(device, "unix:"))
	if err != nil {
		return "" // no TPM, which other checks report better
	}
	return who
}

// WarnOwner warns that the TPM's owner authorization is empty. It asks the TPM, because
// the configuration may name a value that the TPM does not demand.
func (n *Node) WarnOwner(ctx context.Context) {
	if !n.Attests() {
		return
	}
	if set, err := keys.OwnerAuthSet(ctx, n.Gate.Device); err == nil && !set {
		n.Log.Warn("the TPM's owner authorization is empty: whoever may use the TPM can remove its counter and the anchor in it", "device", n.Config.TPM.Device)
	}
}

// WarnTPM warns, at the start and when a keyring is made, that other users may use the
// TPM.
func (n *Node) WarnTPM() {
	if who := n.TPMOpenTo(); who != "" {
		n.Log.Warn("users other than root may use the TPM, and get the KEK with a copy of the keyring", "device", n.Config.TPM.Device, "who", who,
			"ownerAuthorization", n.Config.TPM.OwnerAuthFile != "")
	}
}
