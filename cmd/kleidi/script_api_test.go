package main

import (
	"errors"
	"os"
	"strings"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/beezy-dev/kleidi/internal/carry"
	"github.com/beezy-dev/kleidi/seal/store/kube/kubetest"
)

// api is `api start|stop|again`: the cluster's API, and its kubeconfig in $KUBECONFIG. It is
// one of all hosts of a script. `api plant EXPORT` writes the keyring there as an intruder
// would. `api bind NODE` gives a node its rights, which the administrator's kubeconfig, in
// $ADMIN_KUBECONFIG, takes away; `api bound NODE` looks. `api deny METHOD|none` makes the
// API refuse a method. `api forget NODE` deletes that node's record, which only an
// administrator can put back: `api remember NODE`. `api flood NODE` writes a thousand strangers'
// records, and rubbish into that node's. `api kill before|after RESOURCE` kills this host's
// serve at its next write of the resource.
func (h *host) api(ts *testscript.TestScript, args []string) error {
	if len(args) == 2 && args[0] == "plant" {
		f, err := carry.ParseFile([]byte(ts.ReadFile(args[1])))
		if err == nil {
			h.cluster.Plant(f.Keyring)
		}
		return err
	}
	if len(args) == 3 && args[0] == "kill" {
		h.cluster.FailWrite(kubetest.Moment(args[1]), args[2], h.server.kill)
		return nil
	}
	if len(args) == 2 && args[0] == "bind" {
		h.cluster.Bind(args[1])
		return nil
	}
	if len(args) == 2 && args[0] == "bound" {
		if !h.cluster.Bound(args[1]) {
			return errors.New("it is not bound")
		}
		return nil
	}
	if len(args) == 2 && args[0] == "forget" {
		h.cluster.DeleteRecord(args[1])
		return nil
	}
	if len(args) == 2 && args[0] == "flood" {
		h.cluster.Flood(args[1])
		return nil
	}
	if len(args) == 2 && args[0] == "remember" {
		h.cluster.CreateRecord(args[1])
		return nil
	}
	if len(args) == 2 && args[0] == "deny" {
		h.cluster.Deny(strings.TrimSuffix(args[1], "none"))
		return nil
	}
	if len(args) != 1 {
		return broken("usage: api start|stop|again, or api plant EXPORT")
	}
	switch args[0] {
	case "start":
		a, err := kubetest.Start()
		if err != nil {
			return broken("%w", err)
		}
		h.cluster = a
		ts.Defer(a.Stop)
		ts.Setenv("KUBECONFIG", h.path("api.conf"))
		ts.Setenv("ADMIN_KUBECONFIG", h.path("admin.conf"))
		if err := os.WriteFile(h.path("admin.conf"), a.AdminKubeconfig(), 0o600); err != nil {
			return err
		}
		return os.WriteFile(h.path("api.conf"), a.Kubeconfig(), 0o600)
	case "stop":
		h.cluster.Stop()
		return nil
	case "again":
		return h.cluster.Again()
	}
	return broken("api %s", args[0])
}
