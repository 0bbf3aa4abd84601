// Package gather gathers the facts that package doctor judges: from the running serve, the
// TPM, the event logs, the kernel, the token, Vault and the cluster's API.
//
// It changes nothing, opens no KEK, and gives each source a limited time. A source that
// fails gives the reason instead of the fact.
package gather

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/doctor"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/operation"
)

// Into fills in the missing facts of n. n.Config is already set.
func Into(ctx context.Context, n *doctor.Node, kubeconfig string) error {
	n.Now = time.Now()
	machine, err := node.New(n.Config, slog.New(slog.DiscardHandler), nil)
	if err != nil {
		n.NoConfig = err.Error()
		return nil
	}
	defer machine.Close()
	client, err := admin.Dial(ctx, n.Config.Admin.Socket)
	if n.Serving = err == nil; err != nil && !errors.Is(err, admin.ErrNotRunning) {
		return err
	}
	req := admin.StatusRequest{Try: admin.TryTPM}
	if n.Serving {
		n.Status, err = admin.Call(ctx, client, admin.Status, req)
		n.Process = process(n.Config.Admin.Socket)
		n.Nodes = nodes(ctx, client)
	} else {
		n.Status, err = operation.Status.Alone(ctx, machine, req)
		n.Nodes.Why = "kleidi serve does not run"
	}
	if err != nil {
		return err
	}
	n.Disk, n.Synchronised = disk(n.Config.State.Dir), synchronised()
	n.Certificate = certificate(machine)
	if machine.Attests() {
		n.TPM = fromTPM(ctx, machine)
		n.Boot = boot(ctx, machine, n.TPM)
		n.Digests = digests(machine)
		n.Next = nextBoots(ctx, machine, n)
	}
	n.Token, n.VaultToken = token(ctx, machine), vaultToken(ctx, machine)
	n.API = api(ctx, kubeconfig, n.Config.KMS.Name)
	return nil
}

func nodes(ctx context.Context, c *admin.Client) doctor.Known[admin.NodeList] {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return known(admin.Call(ctx, c, admin.ListNodes, admin.ListNodesRequest{}))
}

// process asks the kernel which process serves on the socket, and reads the facts that
// the process's user and root may read.
func process(socket string) doctor.Known[doctor.Process] {
	pid, uid, err := listener(socket)
	if err != nil {
		return known(doctor.Process{}, err)
	}
	p := doctor.Process{PID: pid, UID: uid}
	status, err := files.Read(fmt.Sprintf("/proc/%d/status", pid), 1<<20)
	if err != nil {
		return known(p, err)
	}
	limits, err := files.Read(fmt.Sprintf("/proc/%d/limits", pid), 1<<20)
	if err != nil {
		return known(p, err)
	}
	if f := strings.Fields(after(string(status), "VmLck:")); len(f) > 0 {
		kB, err := strconv.ParseUint(f[0], 10, 64)
		if err != nil {
			return known(p, err)
		}
		p.Locked = kB << 10
	}
	if f := strings.Fields(after(string(limits), "Max core file size")); len(f) > 0 {
		p.MaxCore = f[0]
	}
	return known(p, nil)
}

// after returns the rest of the line after a word at its beginning, or "".
func after(text, word string) string {
	for line := range strings.Lines(text) {
		if rest, ok := strings.CutPrefix(line, word); ok {
			return rest
		}
	}
	return ""
}

func listener(socket string) (pid, uid int, err error) {
	c, err := net.DialTimeout("unix", socket, limit)
	if err != nil {
		return 0, 0, err
	}
	defer c.Close()
	raw, err := c.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0, 0, err
	}
	var peer *unix.Ucred
	var peerErr error
	if err := raw.Control(func(fd uintptr) { peer, peerErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return 0, 0, err
	}
	if peerErr == nil && peer.Pid == 0 {
		peerErr = errors.New("kleidi serve runs in another PID namespace")
	}
	if peerErr != nil {
		return 0, 0, peerErr
	}
	return int(peer.Pid), int(peer.Uid), nil
}

func disk(dir string) doctor.Known[doctor.Disk] {
	var st unix.Statfs_t
	err := unix.Statfs(dir, &st)
	for os.IsNotExist(err) && dir != filepath.Dir(dir) {
		dir = filepath.Dir(dir)
		err = unix.Statfs(dir, &st)
	}
	if err != nil {
		return known(doctor.Disk{}, &os.PathError{Op: "statfs", Path: dir, Err: err})
	}
	d := doctor.Disk{Free: st.Bavail * uint64(st.Bsize), Inodes: 1}
	if st.Files > 0 { // some file systems have no fixed number of inodes
		d.Inodes = float64(st.Ffree) / float64(st.Files)
	}
	return known(d, nil)
}

// synchronised asks the kernel, which a time client keeps informed.
func synchronised() doctor.Known[bool] {
	var t unix.Timex
	_, err := unix.Adjtimex(&t)
	return known(t.Status&unix.STA_UNSYNC == 0, err)
}

func certificate(n *node.Node) doctor.Known[doctor.Certificate] {
	if n.Config.Cluster.Kubeconfig == "" {
		return doctor.Known[doctor.Certificate]{Why: "cluster.kubeconfig is not set"}
	}
	c, file, err := n.Access.Leaf()
	if err != nil {
		return known(doctor.Certificate{}, err)
	}
	return known(doctor.Certificate{File: file, Ends: c.NotAfter, Lives: c.NotAfter.Sub(c.NotBefore)}, nil)
}
