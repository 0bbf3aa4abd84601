package clusteraccess

import (
	"context"
	"errors"
	"net/http"
	"net/url"

	"github.com/beezy-dev/kleidi/deploy/cluster"
	"github.com/beezy-dev/kleidi/seal/store/kube"
)

const bindings = "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings/"

// CutCommand returns the command that takes away a node's rights in the API.
func CutCommand(node string) string {
	return "kubectl delete clusterrolebinding " + cluster.BindingName(node)
}

// Cut takes away a node's rights on kleidi's resources. admin is the kubeconfig of an
// administrator; if it is empty, Cut tries with this node's own rights, which are usually not
// enough.
func (a *Access) Cut(ctx context.Context, admin, node string) error {
	c, err := a.Client()
	if admin != "" {
		c, err = kube.NewClient(kube.Options{Kubeconfig: admin})
	}
	if err != nil {
		return err
	}
	err = c.Do(ctx, http.MethodDelete, bindings+url.PathEscape(cluster.BindingName(node)), "", nil, nil)
	if r, ok := errors.AsType[*kube.Refusal](err); ok && r.Code == http.StatusNotFound && r.Reason == "NotFound" {
		return nil
	}
	return err
}
