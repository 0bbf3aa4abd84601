//go:build vaultserver

// Command vault is the real Vault core with its HTTP API, Transit, and the
// AppRole, TLS-certificate, Kubernetes and JWT auth methods, without the command
// line and the many other plugins that make the whole server take a quarter of an
// hour to build. It is for tests only and is never shipped (its licence is BUSL).
//
// It keeps its data, the root token and the unseal key in one folder, so that it
// can be stopped and started again. With -standby a second core shares the
// storage of the first, in memory, and stands by.
//
// The build tag keeps go vet and staticcheck away, which would take all of Vault
// apart with it.
package main

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"log"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/hashicorp/go-hclog"
	jwtauth "github.com/hashicorp/vault-plugin-auth-jwt"
	kubeauth "github.com/hashicorp/vault-plugin-auth-kubernetes"
	"github.com/hashicorp/vault/builtin/credential/approle"
	"github.com/hashicorp/vault/builtin/credential/cert"
	"github.com/hashicorp/vault/builtin/logical/transit"
	"github.com/hashicorp/vault/helper/namespace"
	vaulthttp "github.com/hashicorp/vault/http"
	"github.com/hashicorp/vault/internalshared/configutil"
	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/sdk/physical"
	"github.com/hashicorp/vault/sdk/physical/file"
	"github.com/hashicorp/vault/sdk/physical/inmem"
	"github.com/hashicorp/vault/vault"
)

func main() {
	addr := flag.String("addr", "127.0.0.1:18200", "listen on")
	standby := flag.String("standby", "", "a second core listens on this, and stands by")
	certificate := flag.String("tls-cert", "", "the server's certificate, PEM")
	key := flag.String("tls-key", "", "its key, PEM")
	dir := flag.String("dir", ".", "folder of the data, root-token and unseal-key")
	flag.Parse()
	if err := run(*addr, *standby, *certificate, *key, *dir); err != nil {
		log.Fatal(err)
	}
}

func run(addr, standby, certificate, key, dir string) error {
	pair, err := tls.LoadX509KeyPair(certificate, key)
	if err != nil {
		return err
	}
	logger := hclog.New(&hclog.LoggerOptions{Level: hclog.Warn, Output: os.Stderr})
	storage, err := newStorage(dir, standby != "", logger)
	if err != nil {
		return err
	}
	addrs := []string{addr}
	if standby != "" {
		addrs = append(addrs, standby)
	}
	failed := make(chan error)
	for i, a := range addrs {
		core, err := newCore(storage, a, logger)
		if err != nil {
			return err
		}
		if err := open(core, dir); err != nil {
			return err
		}
		if i == 0 {
			if err := waitActive(core); err != nil {
				return err
			}
		}
		go func() { failed <- serve(core, a, pair) }()
	}
	return <-failed
}

// waitActive returns once the core serves. An unsealed core takes the lock of the active
// core in the background, so on a busy machine the second core could take it before the
// first.
func waitActive(core *vault.Core) error {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for ; ; <-tick.C {
		if standby, err := core.Standby(); err != nil || !standby {
			return err
		}
	}
}

// storage is on the disk, or in memory if two cores share it.
type storage struct {
	physical.Backend
	ha physical.HABackend
}

func newStorage(dir string, shared bool, logger hclog.Logger) (storage, error) {
	if !shared {
		backend, err := file.NewFileBackend(map[string]string{"path": filepath.Join(dir, "data")}, logger)
		return storage{Backend: backend}, err
	}
	backend, err := inmem.NewInmemHA(nil, logger)
	if err != nil {
		return storage{}, err
	}
	return storage{backend, backend.(physical.HABackend)}, nil
}

func newCore(s storage, addr string, logger hclog.Logger) (*vault.Core, error) {
	plugins := registry{
		consts.PluginTypeSecrets: {"transit": transit.Factory},
		consts.PluginTypeCredential: {"approle": approle.Factory, "cert": cert.Factory,
			"kubernetes": kubeauth.Factory, "jwt": jwtauth.Factory},
	}
	return vault.NewCore(&vault.CoreConfig{
		Physical: s.Backend, HAPhysical: s.ha, Logger: logger, DisableMlock: true,
		RedirectAddr:    "https://" + addr,
		LogicalBackends: plugins[consts.PluginTypeSecrets], CredentialBackends: plugins[consts.PluginTypeCredential],
		BuiltinRegistry: plugins,
	})
}

// open initializes the core once, and unseals it.
func open(core *vault.Core, dir string) error {
	ctx := namespace.RootContext(context.Background())
	initialized, err := core.Initialized(ctx)
	if err != nil {
		return err
	}
	file := filepath.Join(dir, "unseal-key")
	if !initialized {
		one := &vault.SealConfig{SecretShares: 1, SecretThreshold: 1}
		made, err := core.Initialize(ctx, &vault.InitParams{BarrierConfig: one, RecoveryConfig: one})
		if err != nil {
			return err
		}
		if err := errors.Join(os.WriteFile(file, made.SecretShares[0], 0o600),
			os.WriteFile(filepath.Join(dir, "root-token"), []byte(made.RootToken), 0o600)); err != nil {
			return err
		}
	}
	share, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	unsealed, err := core.Unseal(share)
	if err == nil && !unsealed {
		err = errors.New("one share does not unseal")
	}
	return err
}

func serve(core *vault.Core, addr string, pair tls.Certificate) error {
	server := &http.Server{
		Addr:              addr,
		ReadHeaderTimeout: time.Minute,
		Handler: vaulthttp.Handler.Handler(&vault.HandlerProperties{
			Core: core, ListenerConfig: &configutil.Listener{Address: addr},
		}),
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequestClientCert, MinVersion: tls.VersionTLS12},
	}
	return fmt.Errorf("%s: %w", addr, server.ListenAndServeTLS("", ""))
}

// registry is the catalogue of built-in plugins; a core without one panics on mount.
type registry map[consts.PluginType]map[string]logical.Factory

// Contains implements plugincatalog.BuiltinRegistry, as the other methods do.
func (r registry) Contains(name string, t consts.PluginType) bool { _, ok := r[t][name]; return ok }

// Get returns a plugin's factory.
func (r registry) Get(name string, t consts.PluginType) (func() (any, error), bool) {
	f, ok := r[t][name]
	return func() (any, error) { return f, nil }, ok
}

// Keys lists the plugins of a type.
func (r registry) Keys(t consts.PluginType) (names []string) {
	for name := range r[t] {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// DeprecationStatus says that every plugin here is supported.
func (r registry) DeprecationStatus(name string, t consts.PluginType) (consts.DeprecationStatus, bool) {
	return consts.Supported, r.Contains(name, t)
}

// IsBuiltinEntPlugin says that no plugin here belongs to Enterprise.
func (registry) IsBuiltinEntPlugin(string, consts.PluginType) bool { return false }
