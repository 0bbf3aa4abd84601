package kube

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/url"
	"strconv"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/store"
)

// Names of the resources.
const (
	Group      = "kleidi.beezy.dev"
	APIVersion = Group + "/v1alpha1"

	keyrings    = "/apis/" + APIVersion + "/keyrings"
	nodes       = "/apis/" + APIVersion + "/keyringnodes"
	keyringName = "cluster"
	theKeyring  = keyrings + "/" + keyringName
)

// Store is the cluster store. Its methods may be called concurrently.
type Store struct {
	*Client
	// Summary, if set, describes a keyring in printer columns. RecordSummary does so
	// for a record, beside the keyring in the store.
	Summary       func(keyring []byte) map[string]any
	RecordSummary func(record, keyring []byte) map[string]any
}

// object holds the common parts of the resources.
type object struct {
	APIVersion string   `json:"apiVersion,omitempty"`
	Kind       string   `json:"kind,omitempty"`
	Metadata   metadata `json:"metadata"`
	Spec       spec     `json:"spec"`
}

type metadata struct {
	Name            string `json:"name,omitempty"`
	ResourceVersion string `json:"resourceVersion,omitempty"`
}

type spec struct {
	Keyring []byte `json:"keyring,omitempty"` // of a Keyring
	Record  []byte `json:"record,omitempty"`  // of a KeyringNode
	KEK     []byte `json:"kek,omitempty"`     // of a KeyringArchive
	// KeyringVersion is the resourceVersion of the Keyring before the record was
	// written. It makes the API store a record even if the rest of the record has not
	// changed.
	KeyringVersion string         `json:"keyringVersion,omitempty"`
	Summary        map[string]any `json:"summary,omitempty"`
}

// patch is an operation of a JSON patch.
type patch struct {
	Op    string `json:"op"`
	Path  string `json:"path"`
	Value any    `json:"value"`
}

// Load implements replica.Store.
func (s *Store) Load(ctx context.Context) ([]byte, error) {
	b, _, err := s.load(ctx)
	return b, err
}

// load is Load, and also returns the resourceVersion.
func (s *Store) load(ctx context.Context) ([]byte, string, error) {
	var o object
	err := s.get(ctx, theKeyring, &o)
	if err != nil {
		return nil, "", fmt.Errorf("read Keyring %s: %w", keyringName, lacking("get", "keyrings", err))
	}
	if len(o.Spec.Keyring) > store.MaxSize {
		return nil, "", fmt.Errorf("read Keyring %s: it has more than %d bytes", keyringName, store.MaxSize)
	}
	return o.Spec.Keyring, o.Metadata.ResourceVersion, nil
}

// Ping returns nil if the API lets this client read the Keyring, whether or not there
// is one.
func (s *Store) Ping(ctx context.Context) error {
	_, _, err := s.load(ctx)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

const hintRights = "run kleidi cluster setup --kubeconfig FILE on this node, unless it was removed from the cluster"

// lacking names the right that the node lacks, if that is why the API has refused a request.
// The cause is then [seal.CauseCredentials].
func lacking(verb, resource string, err error) error {
	if !Refused(err, http.StatusForbidden) || seal.CauseOf(err) != "" {
		return err
	}
	return seal.Errorf(seal.CauseCredentials, hintRights, "this node lacks the right to %s %s: %w", verb, resource, err)
}

// get reads an object. The error is fs.ErrNotExist if the API knows the resource and
// has no such object.
func (s *Store) get(ctx context.Context, path string, o *object) error {
	err := s.Do(ctx, http.MethodGet, path, "", nil, o)
	r, ok := errors.AsType[*Refusal](err)
	switch {
	case !ok && errors.Is(err, fs.ErrNotExist): // a file of this client is missing, and the API was not asked
		return seal.Errorf(seal.CauseCredentials, hintRights, "%v", err)
	case !ok || r.Code != http.StatusNotFound:
		return err
	case r.Reason != "NotFound":
		return fmt.Errorf("the API does not know the resource of kleidi: %w", err)
	}
	return fs.ErrNotExist
}

// Swap implements replica.Store.
func (s *Store) Swap(ctx context.Context, old, next []byte) error {
	if len(next) > store.MaxSize {
		return fmt.Errorf("write Keyring %s: more than %d bytes", keyringName, store.MaxSize)
	}
	err := s.swap(ctx, old, next)
	if err == nil || errors.Is(err, store.ErrConflict) || certain(err) {
		return err
	}
	// The answer was lost, or the server failed: it may have stored the keyring.
	back, cancel := context.WithTimeout(context.WithoutCancel(ctx), callTimeout)
	defer cancel()
	if b, _, readErr := s.load(back); readErr == nil && bytes.Equal(b, next) && !bytes.Equal(old, next) {
		return nil
	}
	return err
}

// swapAttempts bounds how often a swap begins again because other parts of the object have
// changed.
const swapAttempts = 8

func (s *Store) swap(ctx context.Context, old, next []byte) error {
	var refused error
	refusedAt := "" // the resourceVersion
	for range swapAttempts {
		b, version, err := s.load(ctx)
		switch absent := errors.Is(err, fs.ErrNotExist); {
		case absent && old == nil:
			return s.create(ctx, next)
		case err != nil && !absent && refused == nil:
			return err
		case err != nil || old == nil || !bytes.Equal(b, old):
			return fmt.Errorf("resource Keyring %s: %w", keyringName, store.ErrConflict)
		case version == refusedAt: // no test of the patch has failed
			return unwanted(refused)
		}
		if refused = s.patch(ctx, version, old, next); !testFailed(refused) {
			return refused
		}
		refusedAt = version
	}
	return unwanted(refused)
}

func (s *Store) patch(ctx context.Context, version string, old, next []byte) error {
	err := s.Do(ctx, http.MethodPatch, theKeyring, JSONPatch, []patch{
		{"test", "/metadata/resourceVersion", version},
		{"test", "/spec/keyring", old},
		{"replace", "/spec/keyring", next},
		{"add", "/spec/summary", summary(s.Summary, next)},
	}, nil)
	if err != nil {
		return fmt.Errorf("write Keyring %s: %w", keyringName, lacking("patch", "keyrings", err))
	}
	return nil
}

// testFailed reports whether the API's answer may mean that a test of a patch has failed. A
// failed test is "unprocessable"; a keyring that was deleted meanwhile is not found. An
// admission policy gives the same answers.
func testFailed(err error) bool {
	return Refused(err, http.StatusUnprocessableEntity) || Refused(err, http.StatusConflict) || Refused(err, http.StatusNotFound)
}

// unwanted gives err the cause and the hint for an object that the API refuses.
func unwanted(err error) error {
	return seal.Caused(seal.CauseConfiguration, "see which admission policy or webhook of the cluster refuses it, and exempt the resources of "+Group, "the API refuses the keyring", err)
}

func (s *Store) create(ctx context.Context, next []byte) error {
	o := object{APIVersion, "Keyring", metadata{Name: keyringName}, spec{Keyring: next, Summary: summary(s.Summary, next)}}
	err := s.Do(ctx, http.MethodPost, keyrings, JSON, o, nil)
	if Refused(err, http.StatusConflict) {
		return fmt.Errorf("resource Keyring %s: %w", keyringName, store.ErrConflict)
	}
	if err != nil {
		err = fmt.Errorf("create Keyring %s: %w", keyringName, lacking("create", "keyrings", err))
	}
	if Refused(err, http.StatusUnprocessableEntity) {
		return unwanted(err)
	}
	return err
}

func summary(f func([]byte) map[string]any, b []byte) map[string]any {
	if f == nil {
		return map[string]any{}
	}
	return f(b)
}

// Records implements replica.Store. It reads each object by its name, because a list
// may come from kube-apiserver's cache.
func (s *Store) Records(ctx context.Context, names ...string) ([]store.NodeRecord, error) {
	_, version, err := s.load(ctx)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var all []store.NodeRecord
	for _, name := range names {
		var o object
		switch err := s.get(ctx, nodes+"/"+url.PathEscape(name), &o); {
		case errors.Is(err, fs.ErrNotExist):
			continue
		case err != nil:
			return nil, fmt.Errorf("read KeyringNode %s: %w", name, lacking("get", "keyringnodes", err))
		}
		if len(o.Spec.Record) > 0 && len(o.Spec.Record) <= store.MaxSize { // the cluster's set-up makes the object without a record
			all = append(all, store.NodeRecord{Node: name, Bytes: o.Spec.Record, AfterKeyring: later(o.Metadata.ResourceVersion, version)})
		}
	}
	return all, nil
}

// later reports whether resourceVersion a is after b. Both are revisions of etcd.
func later(a, b string) bool {
	x, errA := strconv.ParseUint(a, 10, 64)
	y, errB := strconv.ParseUint(b, 10, 64)
	return errA == nil && errB == nil && x > y
}

// PutRecord implements replica.Store.
func (s *Store) PutRecord(ctx context.Context, node string, record []byte) error {
	current, version, err := s.load(ctx)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	o := object{Spec: spec{Record: record, KeyringVersion: version}}
	if s.RecordSummary != nil {
		o.Spec.Summary = s.RecordSummary(record, current)
	}
	err = s.Do(ctx, http.MethodPatch, nodes+"/"+url.PathEscape(node), MergePatch, o, nil)
	if Refused(err, http.StatusNotFound) {
		o.APIVersion, o.Kind, o.Metadata.Name = APIVersion, "KeyringNode", node
		err = s.Do(ctx, http.MethodPost, nodes, JSON, o, nil)
		if Refused(err, http.StatusForbidden) {
			err = seal.Errorf(seal.CauseCredentials, hintRights, "there is no such object: %w", err)
		}
	}
	if err != nil {
		return fmt.Errorf("write KeyringNode %s: %w", node, lacking("patch", "keyringnodes", err))
	}
	return nil
}
