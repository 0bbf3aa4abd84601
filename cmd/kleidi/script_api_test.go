package main

import (
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path"
	"reflect"
	"strconv"
	"strings"
	"sync"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/beezy-dev/kleidi/internal/carry"
	"github.com/beezy-dev/kleidi/seal/store/kube"
)

// clusterAPI is as much of a cluster's API as the cluster store needs: objects of kleidi's
// resources, JSON and merge patches, and watches. e2e/clusterstore and e2e/ha have a real one.
type clusterAPI struct {
	address string
	server  *httptest.Server

	mu      sync.Mutex
	version int
	objects map[string]map[string]any // by path
	changed chan struct{}
}

// startAPI serves an empty API at a loopback address.
func startAPI() (*clusterAPI, error) {
	a := &clusterAPI{version: 1, objects: map[string]map[string]any{}, changed: make(chan struct{})}
	err := a.start("127.0.0.1:0")
	a.address = a.server.Listener.Addr().String()
	return a, err
}

func (a *clusterAPI) start(address string) error {
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

// stop ends the API; its objects stay.
func (a *clusterAPI) stop() {
	a.server.CloseClientConnections()
	a.server.Close()
}

// ServeHTTP implements http.Handler.
func (a *clusterAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Query().Has("watch") {
		a.watch(w, r)
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	code, answer := a.answer(r)
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(answer)
}

func refusal(code int, reason string) (int, map[string]any) {
	return code, map[string]any{"kind": "Status", "reason": reason, "message": reason}
}

func (a *clusterAPI) answer(r *http.Request) (int, map[string]any) {
	if !strings.HasPrefix(r.URL.Path, "/apis/"+kube.APIVersion+"/keyring") {
		return refusal(http.StatusNotFound, "")
	}
	object := a.objects[r.URL.Path]
	if object == nil && r.Method != http.MethodPost {
		return refusal(http.StatusNotFound, "NotFound")
	}
	switch r.Method {
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
func (a *clusterAPI) patch(r *http.Request, object map[string]any) (int, map[string]any) {
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

func (a *clusterAPI) put(at string, o map[string]any) (int, map[string]any) {
	a.version++
	o["metadata"].(map[string]any)["resourceVersion"] = strconv.Itoa(a.version)
	a.objects[at] = o
	close(a.changed)
	a.changed = make(chan struct{})
	return http.StatusOK, o
}

// watch writes a line at each change of any object.
func (a *clusterAPI) watch(w http.ResponseWriter, r *http.Request) {
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

// plant puts the keyring of an export into the store, as anybody can who may write it.
func (a *clusterAPI) plant(export string) error {
	f, err := carry.ParseFile([]byte(export))
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	at := "/apis/" + kube.APIVersion + "/keyrings/cluster"
	a.objects[at]["spec"].(map[string]any)["keyring"] = base64.StdEncoding.EncodeToString(f.Keyring)
	a.put(at, a.objects[at])
	return nil
}

// api is `api start|stop|again`: the cluster's API, and its kubeconfig in $KUBECONFIG. It
// is one of all hosts of a script. `api plant EXPORT` has somebody write the keyring there.
func (h *host) api(ts *testscript.TestScript, args []string) error {
	if len(args) == 2 && args[0] == "plant" {
		return h.cluster.plant(ts.ReadFile(args[1]))
	}
	if len(args) != 1 {
		return broken("usage: api start|stop|again, or api plant EXPORT")
	}
	switch args[0] {
	case "start":
		a, err := startAPI()
		if err != nil {
			return broken("%w", err)
		}
		h.cluster = a
		ts.Defer(a.stop)
		ts.Setenv("KUBECONFIG", h.path("api.conf"))
		return os.WriteFile(h.path("api.conf"), fmt.Appendf(nil, `apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: %q, certificate-authority-data: %s}}]
contexts: [{name: c, context: {cluster: c}}]
current-context: c
`, a.server.URL, base64.StdEncoding.EncodeToString(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.server.Certificate().Raw}))), 0o600)
	case "stop":
		h.cluster.stop()
		return nil
	case "again":
		return h.cluster.start(h.cluster.address)
	}
	return broken("api %s", args[0])
}
