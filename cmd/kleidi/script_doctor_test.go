package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/beezy-dev/kleidi/internal/doctor/diagnosis"
)

// ofTestMachine are the kinds of findings about the machine on which the tests run. A scene
// has neither its root file system nor its clock in hand; e2e/packages has.
var ofTestMachine = []string{"root/unverified", "hooks/missing", "clock/unsynchronised"}

// doctorCommand looks a node over, with $WORK/encryption.yaml and $WORK/manifest.yaml as the
// files of kube-apiserver:
//
//	doctor finds [KIND...]       it finds these kinds of faults, and nothing else
//	doctor comes-to [KIND...]    the same, once the nodes know each other's state
//	doctor mends KIND [LEFT...]  it finds this kind alone, the command that it prints is run as
//	                             copied, and then it finds nothing, or what is left to do
//
// The findings can then be matched as stdout.
func (h *host) doctorCommand(ts *testscript.TestScript, args []string) error {
	if args[0] == "comes-to" {
		return eventually(func() error {
			r, err := h.doctor(ts)
			if err != nil {
				return broken("doctor: %w", err)
			}
			return only(r, args[1:])
		})
	}
	r, err := h.doctor(ts)
	if err != nil {
		return broken("doctor: %w", err)
	}
	for _, f := range r.Findings {
		fmt.Fprintf(ts.Stdout(), "%s: %s\n%s\n-> %s\n", f.ID, f.What, f.Why, f.Command)
	}
	if args[0] == "finds" {
		return only(r, args[1:])
	}
	if err := only(r, args[1:2]); err != nil {
		return err
	}
	i := slices.IndexFunc(r.Findings, func(f diagnosis.Finding) bool { return f.ID == args[1] })
	// The only word that an operator fills in
	printed := strings.ReplaceAll(r.Findings[i].Command, " RECIPIENT", " "+ts.Getenv("RECIPIENT"))
	command := exec.Command("sh", "-c", printed)
	command.Dir = h.work
	// No kubelet is here, which would restart kube-apiserver.
	wrapper := fmt.Sprintf("#!/bin/sh\ncase \"$*\" in *' kubeadm patch --apply '*) set -- \"$@\" --wait=false ;; esac\nexec %s \"$@\"\n", binary)
	// A child that another scene forks meanwhile would keep the file open, and the file could
	// not be executed (ETXTBSY).
	syscall.ForkLock.RLock()
	err = errors.Join(os.MkdirAll(h.path("operator"), 0o700), os.WriteFile(h.path("operator/kleidi"), []byte(wrapper), 0o700))
	syscall.ForkLock.RUnlock()
	if err != nil {
		return broken("%w", err)
	}
	command.Env = append(os.Environ(), "PATH="+h.path("operator")+string(filepath.ListSeparator)+ts.Getenv("PATH"), "SOFTHSM2_CONF="+ts.Getenv("SOFTHSM2_CONF"))
	if out, err := command.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", printed, err, out)
	}
	after, err := h.doctor(ts)
	if err != nil {
		return broken("doctor: %w", err)
	}
	return only(after, args[2:])
}

// doctor runs kleidi doctor, whose exit code must suit its findings.
func (h *host) doctor(ts *testscript.TestScript) (r diagnosis.Report, err error) {
	command := exec.Command(binary, "--config", h.path("config.yaml"), "doctor", "-o", "json", "--encryption-config", h.path("encryption.yaml"), "--manifest", h.path("manifest.yaml"))
	command.Env = append(os.Environ(), "SOFTHSM2_CONF="+ts.Getenv("SOFTHSM2_CONF"))
	out, err := command.Output()
	if err := json.Unmarshal(out, &r); err != nil {
		return r, fmt.Errorf("%w: %s", err, out)
	}
	if want := map[bool]int{true: 0, false: exitProblem}[r.Healthy()]; command.ProcessState.ExitCode() != want {
		return r, fmt.Errorf("the exit code is %d, want %d: %w\n%s", command.ProcessState.ExitCode(), want, err, out)
	}
	return r, nil
}

// only checks that exactly these kinds were found.
func only(r diagnosis.Report, want []string) error {
	var got []string
	for _, f := range r.Findings {
		if !slices.Contains(got, f.ID) && !slices.Contains(ofTestMachine, f.ID) {
			got = append(got, f.ID)
		}
	}
	slices.Sort(got)
	if want = slices.Sorted(slices.Values(want)); !slices.Equal(got, want) {
		return fmt.Errorf("doctor finds %q, want %q: %+v", got, want, r.Findings)
	}
	return nil
}
