package cluster

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/node"
)

// Etcd is a member of a real etcd. Tests read it through its JSON gateway, which needs
// no client library.
type Etcd struct {
	*node.Process
	URL string

	host   Host
	dir    string
	binary string
	args   []string
}

// StartEtcd runs an etcd of one member on the loopback, with its log and its data in a folder.
func StartEtcd(t testing.TB, binary, dir string) *Etcd {
	t.Helper()
	url, peer := "http://127.0.0.1:"+node.FreePort(t), "http://127.0.0.1:"+node.FreePort(t)
	e := newEtcd(Loopback, binary, dir, url, peer, "default", "default="+peer)
	e.Start(t)
	e.WaitHealthy(t)
	return e
}

// NewMembers prepares an etcd with one member on each host. Their folders are below dir.
func NewMembers(hosts []Host, binary, dir string) []*Etcd {
	var members, peers []string
	for i, h := range hosts {
		peers = append(peers, "http://"+h.Address+":2380")
		members = append(members, fmt.Sprintf("e%d=%s", i+1, peers[i]))
	}
	all := make([]*Etcd, len(hosts))
	for i, h := range hosts {
		name := fmt.Sprintf("e%d", i+1)
		all[i] = newEtcd(h, binary, filepath.Join(dir, name), "http://"+h.Address+":2379", peers[i], name, strings.Join(members, ","))
		// By default a busy machine that delays heartbeats for a second causes an election, during
		// which writes fail.
		all[i].args = append(all[i].args, "--heartbeat-interval", "300", "--election-timeout", "3000")
	}
	return all
}

func newEtcd(h Host, binary, dir, url, peer, name, members string) *Etcd {
	return &Etcd{URL: url, host: h, dir: dir, binary: binary, args: []string{
		"--name", name, "--data-dir", filepath.Join(dir, "etcd"), "--unsafe-no-fsync", "--log-level", "warn",
		"--listen-client-urls", url, "--advertise-client-urls", url,
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", members,
	}}
}

// Start runs the member, with the data of its earlier run if there was one.
func (e *Etcd) Start(t testing.TB) {
	t.Helper()
	if err := os.MkdirAll(e.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	e.Process = e.host.start(t, filepath.Join(e.dir, "etcd.log"), e.binary, e.args...)
}

// Upgrade has the next start run another version.
func (e *Etcd) Upgrade(binary string) { e.binary = binary }

// WaitHealthy returns once the member answers reads, which needs a quorum.
func (e *Etcd) WaitHealthy(t testing.TB) {
	t.Helper()
	node.Eventually(t, 2*time.Minute, "etcd answers", func() error {
		if err := e.Alive(); err != nil {
			t.Fatal(err)
		}
		_, err := e.Get("/registry/")
		return err
	})
}

// Snapshot copies the data of all members at one moment.
func Snapshot(t testing.TB, members []*Etcd) (restore func()) {
	t.Helper()
	kept := t.TempDir()
	for _, e := range members {
		e.Freeze()
		defer e.Thaw()
	}
	for _, e := range members {
		if err := os.CopyFS(filepath.Join(kept, e.name()), os.DirFS(e.Data())); err != nil {
			t.Fatal(err)
		}
	}
	// restore puts the data back into members that don't run.
	return func() {
		t.Helper()
		for _, e := range members {
			err := errors.Join(os.RemoveAll(e.Data()), os.CopyFS(e.Data(), os.DirFS(filepath.Join(kept, e.name()))), os.Chmod(e.Data(), 0o700))
			if err != nil {
				t.Fatal(err)
			}
		}
	}
}

func (e *Etcd) name() string { return filepath.Base(e.dir) }

// Data is the member's data folder.
func (e *Etcd) Data() string { return filepath.Join(e.dir, "etcd") }

// RestoreEnv describes this member to a command that restores a snapshot: its name, the
// peers' URLs of all members and its own, and its data folder, which must be empty.
func (e *Etcd) RestoreEnv() []string {
	at := func(flag string) string { return e.args[slices.Index(e.args, flag)+1] }
	return []string{"NAME=" + at("--name"), "MEMBERS=" + at("--initial-cluster"), "PEER=" + at("--initial-advertise-peer-urls"), "DATA=" + e.Data()}
}

// Leads reports whether this member leads the others.
func (e *Etcd) Leads() (bool, error) {
	var status struct {
		Header struct {
			MemberID string `json:"member_id"`
		} `json:"header"`
		Leader string `json:"leader"`
	}
	err := call(gateway, e.URL+"/v3/maintenance/status", struct{}{}, &status)
	return status.Leader == status.Header.MemberID, err
}

// Get returns the raw values below a prefix, by key.
func (e *Etcd) Get(prefix string) (map[string][]byte, error) { return get(gateway, e.URL, prefix) }

func get(client *http.Client, url, prefix string) (map[string][]byte, error) {
	end := []byte(prefix)
	end[len(end)-1]++
	var answer struct {
		KVs []struct{ Key, Value []byte }
	}
	if err := call(client, url+"/v3/kv/range", map[string][]byte{"key": []byte(prefix), "range_end": end}, &answer); err != nil {
		return nil, err
	}
	values := map[string][]byte{}
	for _, kv := range answer.KVs {
		values[string(kv.Key)] = kv.Value
	}
	return values, nil
}

// Put stores a raw value, behind kube-apiserver's back.
func (e *Etcd) Put(key string, value []byte) error {
	var answer struct{}
	return call(gateway, e.URL+"/v3/kv/put", map[string][]byte{"key": []byte(key), "value": value}, &answer)
}

// Snapshot writes a file like that of `etcdctl snapshot save`: the database, and its
// SHA-256 sum.
func (e *Etcd) Snapshot(t testing.TB, file string) {
	t.Helper()
	res, err := gateway.Post(e.URL+"/v3/maintenance/snapshot", "application/json", strings.NewReader("{}"))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	var all []byte
	for d := json.NewDecoder(res.Body); d.More(); {
		var part struct {
			Result struct{ Blob []byte }
			Error  any
		}
		if err := d.Decode(&part); err != nil || part.Error != nil {
			t.Fatal(err, part.Error)
		}
		all = append(all, part.Result.Blob...)
	}
	if err := os.WriteFile(file, all, 0o600); err != nil {
		t.Fatal(err)
	}
}

// gateway gives up a member that accepts no connection, as one that is cut off. On a busy
// machine a snapshot, or the values of thousands of objects, take minutes.
var gateway = &http.Client{Timeout: 10 * time.Minute, Transport: &http.Transport{DialContext: (&net.Dialer{Timeout: 20 * time.Second}).DialContext, DisableKeepAlives: true}}

// call asks etcd's JSON gateway.
func call(client *http.Client, url string, request, answer any) error {
	b, err := json.Marshal(request)
	if err != nil {
		return err
	}
	res, err := client.Post(url, "application/json", bytes.NewReader(b))
	if err != nil {
		return err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		return err
	}
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s: %s", url, res.Status, body)
	}
	return json.Unmarshal(body, answer)
}
