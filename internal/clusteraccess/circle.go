package clusteraccess

import (
	"context"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/store/kube"
)

// checkStoredInClear refuses an API that stores the cluster store encrypted, since its
// kube-apiserver could then read the keyring only with a KEK from that keyring. The
// metrics of kube-apiserver show that, if its version labels them with the resource.
// Only an administrator may read them. If they don't show it, nothing is refused.
func (a *Access) checkStoredInClear(ctx context.Context, admin *kube.Client) error {
	before := encryptedWrites(ctx, admin)
	if before == "" {
		return nil
	}
	// The counter starts with kube-apiserver. A write shows the present configuration.
	path := "/apis/" + kube.APIVersion + "/keyringnodes/" + url.PathEscape(a.Node)
	note := map[string]any{"metadata": map[string]any{"annotations": map[string]string{kube.Group + "/checked": time.Now().UTC().Format(time.RFC3339Nano)}}}
	if err := admin.Do(ctx, http.MethodPatch, path, kube.MergePatch, note, nil); err != nil {
		return err
	}
	if encryptedWrites(ctx, admin) == before {
		return nil
	}
	return seal.Errorf(seal.CauseConfiguration, "put an entry for '*."+kube.Group+"' with the provider identity before all others in kube-apiserver's EncryptionConfiguration, and restart kube-apiserver",
		"kube-apiserver encrypts the cluster store itself, so that a node could read it only with the KEK that is in it")
}

// encryptedWrites returns the lines of kube-apiserver's metrics that count the encrypted
// writes to the cluster store.
func encryptedWrites(ctx context.Context, admin *kube.Client) string {
	var all strings.Builder
	_ = admin.Lines(ctx, "/metrics", func(line string) {
		if strings.HasPrefix(line, "apiserver_storage_transformation_operations_total{") && strings.Contains(line, "."+kube.Group+`"`) &&
			strings.Contains(line, `transformation_type="to_storage"`) && strings.Contains(line, `transformer_prefix="k8s:enc:`) {
			all.WriteString(line + "\n")
		}
	}) // without metrics nothing is known
	return all.String()
}
