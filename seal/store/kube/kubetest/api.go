// Package kubetest serves the part of a cluster's API that the cluster store uses, for tests
// without a kube-apiserver. e2e/clusterstore and e2e/ha have a real one.
package kubetest

import (
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"path"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/beezy-dev/kleidi/seal/store/kube"
)

// API is the part of a cluster's API that the cluster store needs: objects of kleidi's
// resources, JSON and merge patches, and watches. Its methods may be called concurrently.
type API struct {
	address string
	server  *httptest.Server

	mu      sync.Mutex
	version int
	objects map[string]map[string]any // by path
	changed chan struct{}
	fault   *fault
	denied  string // method that nobody may use
	strict  bool   // only the administrator may create a KeyringNode
}

// bindings are where the API keeps which node has the rights of its role. Only the
// administrator may change them.
const bindings = "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings/"

const records = "/apis/" + kube.APIVersion + "/keyringnodes"

const adminToken = "administrator"

// Bind gives a node the rights of its role. The API does not look at them.
func (a *API) Bind(node string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.objects[binding(node)] = map[string]any{"metadata": map[string]any{}}
}

// Bound reports whether a node has the rights of its role.
func (a *API) Bound(node string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.objects[binding(node)] != nil
}

func binding(node string) string { return bindings + "kleidi-node-" + node }

// Deny makes the API refuse each request with a method; "" refuses none.
func (a *API) Deny(method string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.denied = method
}

// Moment is when a write fails.
type Moment string

// The moments: before the write is stored, and after it.
const (
	Before Moment = "before"
	After  Moment = "after"
)

// DeleteRecord deletes the KeyringNode of a node. From then on the API lets only the
// administrator create one, as a real API does with the roles of kleidi cluster setup.
func (a *API) DeleteRecord(node string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.strict = true
	delete(a.objects, records+"/"+node)
	a.tell()
}

// CreateRecord creates the KeyringNode of a node without a record, as kleidi cluster setup does.
func (a *API) CreateRecord(node string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.put(records+"/"+node, map[string]any{"metadata": map[string]any{"name": node}, "spec": map[string]any{}})
}

// Flood writes what an intruder with all rights on kleidi's resources would: strangers'
// records, and rubbish in that of a node, each as large as the API allows and again and again.
func (a *API) Flood(node string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	rubbish := base64.StdEncoding.EncodeToString(make([]byte, 64<<10))
	for i := range 1000 {
		for _, name := range []string{node, "stranger-" + strconv.Itoa(i)} {
			a.put(records+"/"+name, map[string]any{"metadata": map[string]any{"name": name}, "spec": map[string]any{"record": rubbish}})
		}
	}
}

// fault happens at the next write of a resource, before or after the write is stored. The
// answer never comes.
type fault struct {
	when   Moment
	path   string // its beginning
	happen func()
}

// FailWrite runs happen at the next write below a path of the API group, before or after it
// is stored, and then closes the connection without an answer.
func (a *API) FailWrite(when Moment, path string, happen func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.fault = &fault{when, "/apis/" + kube.APIVersion + "/" + path, happen}
}

// fail makes the fault happen if this is its request.
func (a *API) fail(when Moment, r *http.Request) {
	f := a.fault
	if f == nil || f.when != when || r.Method == http.MethodGet || !strings.HasPrefix(r.URL.Path, f.path) {
		return
	}
	a.fault = nil
	f.happen()
	panic(http.ErrAbortHandler)
}

// Start serves an empty API at a loopback address.
func Start() (*API, error) {
	a := &API{version: 1, objects: map[string]map[string]any{}, changed: make(chan struct{})}
	for {
		// The kernel gives no such port to others, so it stays free while this API is stopped.
		a.address = fmt.Sprintf("127.0.0.1:%d", 12000+rand.IntN(8000))
		if err := a.start(a.address); !errors.Is(err, syscall.EADDRINUSE) {
			return a, err
		}
	}
}

// Again serves the objects of a stopped API at its former address.
func (a *API) Again() error { return a.start(a.address) }

func (a *API) start(address string) error {
	a.server = httptest.NewUnstartedServer(a)
	a.server.Listener.Close()
	l, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	a.server.Listener = l
	a.server.StartTLS()
	return nil
}

// Stop ends the API; its objects stay.
func (a *API) Stop() {
	a.server.CloseClientConnections()
	a.server.Close()
}

// ServeHTTP implements http.Handler.
func (a *API) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Query().Has("watch") {
		a.watch(w, r)
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.fail(Before, r)
	code, answer := a.answer(r)
	a.fail(After, r)
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(answer)
}

func refusal(code int, reason string) (int, map[string]any) {
	return code, map[string]any{"kind": "Status", "reason": reason, "message": reason}
}

func (a *API) answer(r *http.Request) (int, map[string]any) {
	isBinding := strings.HasPrefix(r.URL.Path, bindings)
	isAdmin := r.Header.Get("Authorization") == "Bearer "+adminToken
	switch {
	case r.Method == a.denied, isBinding && !isAdmin, a.strict && r.Method == http.MethodPost && r.URL.Path == records && !isAdmin:
		return refusal(http.StatusForbidden, "Forbidden")
	case !isBinding && !strings.HasPrefix(r.URL.Path, "/apis/"+kube.APIVersion+"/keyring"):
		return refusal(http.StatusNotFound, "")
	}
	object := a.objects[r.URL.Path]
	if object == nil && r.Method != http.MethodPost {
		return refusal(http.StatusNotFound, "NotFound")
	}
	switch r.Method {
	case http.MethodDelete:
		if isBinding {
			delete(a.objects, r.URL.Path)
			return http.StatusOK, object
		}
	case http.MethodGet:
		return http.StatusOK, object
	case http.MethodPost:
		var o map[string]any
		if err := json.NewDecoder(r.Body).Decode(&o); err != nil {
			return refusal(http.StatusBadRequest, err.Error())
		}
		at := path.Join(r.URL.Path, o["metadata"].(map[string]any)["name"].(string))
		if a.objects[at] != nil {
			return refusal(http.StatusConflict, "AlreadyExists")
		}
		return a.put(at, o)
	case http.MethodPatch:
		if r.Header.Get("Content-Type") == kube.MergePatch {
			var p struct{ Spec map[string]any }
			if err := json.NewDecoder(r.Body).Decode(&p); err != nil {
				return refusal(http.StatusBadRequest, err.Error())
			}
			if reflect.DeepEqual(object["spec"], any(p.Spec)) {
				return http.StatusOK, object
			}
			object["spec"] = p.Spec
			return a.put(r.URL.Path, object)
		}
		return a.patch(r, object)
	}
	return refusal(http.StatusMethodNotAllowed, "MethodNotAllowed")
}

// patch applies a JSON patch whose paths have two parts.
func (a *API) patch(r *http.Request, object map[string]any) (int, map[string]any) {
	var all []struct {
		Op, Path string
		Value    any
	}
	if err := json.NewDecoder(r.Body).Decode(&all); err != nil {
		return refusal(http.StatusBadRequest, err.Error())
	}
	for _, p := range all {
		parts := strings.Split(strings.TrimPrefix(p.Path, "/"), "/")
		in := object[parts[0]].(map[string]any)
		if p.Op == "test" && !reflect.DeepEqual(in[parts[1]], p.Value) {
			return refusal(http.StatusUnprocessableEntity, "Invalid")
		}
	}
	for _, p := range all {
		parts := strings.Split(strings.TrimPrefix(p.Path, "/"), "/")
		if p.Op != "test" {
			object[parts[0]].(map[string]any)[parts[1]] = p.Value
		}
	}
	return a.put(r.URL.Path, object)
}

func (a *API) put(at string, o map[string]any) (int, map[string]any) {
	a.version++
	o["metadata"].(map[string]any)["resourceVersion"] = strconv.Itoa(a.version)
	a.objects[at] = o
	a.tell()
	return http.StatusOK, o
}

// tell ends the wait of each watch.
func (a *API) tell() {
	close(a.changed)
	a.changed = make(chan struct{})
}

// watch writes a line at each change of any object.
func (a *API) watch(w http.ResponseWriter, r *http.Request) {
	for {
		a.mu.Lock()
		changed := a.changed
		a.mu.Unlock()
		w.(http.Flusher).Flush()
		select {
		case <-changed:
			fmt.Fprintln(w, "{}")
		case <-r.Context().Done():
			return
		}
	}
}

// Plant puts a keyring into the store, as anybody with write access can.
func (a *API) Plant(keyring []byte) {
	a.mu.Lock()
	defer a.mu.Unlock()
	at := "/apis/" + kube.APIVersion + "/keyrings/cluster"
	a.objects[at]["spec"].(map[string]any)["keyring"] = base64.StdEncoding.EncodeToString(keyring)
	a.put(at, a.objects[at])
}

// Kubeconfig returns a kubeconfig with all rights on kleidi's resources.
func (a *API) Kubeconfig() []byte { return a.kubeconfig("{}") }

// AdminKubeconfig returns the administrator's kubeconfig.
func (a *API) AdminKubeconfig() []byte { return a.kubeconfig("{token: " + adminToken + "}") }

func (a *API) kubeconfig(user string) []byte {
	return fmt.Appendf(nil, `apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: %q, certificate-authority-data: %s}}]
users: [{name: u, user: %s}]
contexts: [{name: c, context: {cluster: c, user: u}}]
current-context: c
`, a.server.URL, base64.StdEncoding.EncodeToString(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.server.Certificate().Raw})), user)
}
