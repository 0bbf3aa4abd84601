package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os/exec"
	"regexp"
	"strings"
	"syscall"

	"github.com/rogpeppe/go-internal/testscript"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	kmsapi "k8s.io/kms/apis/v2"

	"github.com/beezy-dev/kleidi/seal"
)

// tableRow is a boot, with its result.
type tableRow struct{ boot, verdict, reason string }

// row boots the machine, if a boot is given, runs serve to its verdict, and writes a
// row of the table:
//
//	row NAME [-log REGEX] [LOADER [FIELD=VALUE...]]
//
// The DEK seed that was encrypted as boot1 must decrypt if the keyring opens, and only
// then. With -log, row reads the verdict once the log matches.
//
//	row NAME -run ARGS...    a command that must fail, with the reason
func (h *host) row(ts *testscript.TestScript, args []string) error {
	name, args := args[0], args[1:]
	if len(args) > 0 && args[0] == "-run" {
		out, err := exec.Command(binary, append([]string{"--config", h.path("config.yaml")}, args[1:]...)...).CombinedOutput()
		if _, message, ok := strings.Cut("\n"+string(out), "\nerror: "); err != nil && ok {
			h.table = append(h.table, tableRow{name, "refused", brief(message)})
			return nil
		}
		return broken("row %s: %v, %s", name, err, out)
	}
	var log string
	if len(args) > 1 && args[0] == "-log" {
		log, args = args[1], args[2:]
	}
	if len(args) > 0 {
		if err := h.machineCommand(ts, append([]string{"boot"}, args...)); err != nil {
			return err
		}
	}
	if err := h.serve(ts, nil); err != nil {
		return err
	}
	if log != "" {
		if err := h.waitFor(ts, []string{"log", log}); err != nil {
			return err
		}
	}
	r, err := h.verdict()
	if err != nil {
		return broken("row %s: %w\n%s", name, err, h.server.log.String())
	}
	r.boot = name
	h.table = append(h.table, r)
	_ = h.server.cmd.Process.Signal(syscall.SIGTERM)
	<-h.server.ended
	return nil
}

// starting reports whether serve, by an answer of /readyz, has not tried to open the keyring.
func starting(body string) bool {
	return strings.Contains(body, string(seal.CauseStarting)) || strings.HasPrefix(body, "KMS socket")
}

// verdict waits for the verdict of the running serve.
func (h *host) verdict() (r tableRow, err error) {
	var code int
	var body string
	err = eventually(func() error {
		if !h.server.running() {
			return broken("serve has died: %v", h.server.err)
		}
		if code, body, err = h.fetch("/readyz"); err != nil {
			return err
		}
		if starting(body) {
			return errors.New("it is starting")
		}
		return nil
	})
	if err != nil {
		return r, err
	}
	r.verdict, r.reason = "locked", brief(strings.TrimPrefix(body, "locked: "))
	if code == http.StatusOK {
		r.verdict, r.reason = "opens", brief(strings.TrimPrefix(body, "ok\n"))
	}
	return r, h.decrypts(code == http.StatusOK)
}

// decrypts asks for the DEK seed of the first boot.
func (h *host) decrypts(want bool) error {
	conn, err := grpc.NewClient("unix://"+h.path("run/kms.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(h.t.Context(), waitTimeout)
	defer cancel()
	_, err = h.call(ctx, kmsapi.NewKeyManagementServiceClient(conn), []string{"decrypt", "boot1"})
	if ctx.Err() != nil || (err == nil) != want {
		return broken("the DEK seed of the first boot decrypts: %v; want that it does: %t", err, want)
	}
	return nil
}

// briefly replaces parts that differ from run to run, and causes and hints that other
// tests check.
var briefly = []struct {
	what    *regexp.Regexp
	instead string
}{
	{regexp.MustCompile(`(?s)\n.*`), ""},
	{regexp.MustCompile(`the machine (did not boot as it did when the slot was sealed|booted [^:]*|was booted [^:]*|is in another phase [^:]*): `), ""},
	{regexp.MustCompile(`; (boot the earlier|if this change|put the|use the present|run |if Secure Boot).*`), ""},
	{regexp.MustCompile(`: was [0-9a-f]{12}…(, now [0-9a-f]{12}…)?`), ""},
	{regexp.MustCompile(` \((\\EFI|usually) ?[^)]*\)`), ""},
	{regexp.MustCompile(`k1-[a-z2-7]{52}`), "k1-…"},
	{regexp.MustCompile(`[0-9a-f]{12}…|[0-9a-f]{32}`), "…"},
	{regexp.MustCompile(`, [0-9]+ bytes`), ""},
	{regexp.MustCompile(`(revision|reset|epoch) [0-9]+`), "$1 N"},
}

func brief(reason string) string {
	for _, r := range briefly {
		reason = r.what.ReplaceAllString(reason, r.instead)
	}
	return strings.TrimSpace(reason)
}

// printTable shows the rows in their order.
func (h *host) printTable(ts *testscript.TestScript, _ []string) error {
	for _, r := range h.table {
		line := fmt.Sprintf("%-44s  %-7s  %s", r.boot, r.verdict, r.reason)
		fmt.Fprintln(ts.Stdout(), strings.TrimRight(line, " "))
	}
	return nil
}
