package kubernetes

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/node"
)

// etcd is a real server, read through its JSON gateway, which needs no client library.
type etcd struct {
	*node.Process
	url string
}

func startEtcd(t *testing.T, n *node.Node) *etcd {
	t.Helper()
	e := &etcd{url: "http://127.0.0.1:" + node.FreePort(t)}
	peer := "http://127.0.0.1:" + node.FreePort(t)
	e.Process = node.Start(t, n.Path("etcd.log"), binaries["etcd"],
		"--data-dir", n.Path("etcd"), "--unsafe-no-fsync", "--log-level", "warn",
		"--listen-client-urls", e.url, "--advertise-client-urls", e.url,
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", "default="+peer)
	node.Eventually(t, time.Minute, "etcd answers", func() error {
		if err := e.Alive(); err != nil {
			t.Fatal(err)
		}
		_, err := e.get("/registry/")
		return err
	})
	return e
}

// get returns the raw values below a prefix, by key.
func (e *etcd) get(prefix string) (map[string][]byte, error) {
	end := []byte(prefix)
	end[len(end)-1]++
	query, err := json.Marshal(map[string][]byte{"key": []byte(prefix), "range_end": end})
	if err != nil {
		return nil, err
	}
	res, err := http.Post(e.url+"/v3/kv/range", "application/json", bytes.NewReader(query))
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		return nil, err
	}
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("range: %s: %s", res.Status, body)
	}
	var answer struct {
		KVs []struct{ Key, Value []byte }
	}
	if err := json.Unmarshal(body, &answer); err != nil {
		return nil, err
	}
	values := map[string][]byte{}
	for _, kv := range answer.KVs {
		values[string(kv.Key)] = kv.Value
	}
	return values, nil
}
