package doctor

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/beezy-dev/kleidi/internal/doctor/diagnosis"
)

func eventLog(n *Node) []diagnosis.Finding {
	log := n.Config.TPM.EventLog
	boot := n.Boot.Value
	switch {
	case !n.usesTPM():
		return nil
	case !n.exists(log):
		return diagnosis.Found("event-log/missing", "mount -t securityfs securityfs /sys/kernel/security   # still none: boot in UEFI mode", "there is no event log %s", log)
	case boot == nil:
		return diagnosis.NotChecked("the event logs were not compared with the TPM: %s", n.Boot.Why)
	case boot.LogProblem != "":
		return diagnosis.Found("event-log/unreadable", "kleidi bootpolicy explain   # shows what can be read", "%s", boot.LogProblem)
	case boot.Mismatch != "":
		return diagnosis.Found("event-log/differs", "kleidi bootpolicy explain   # shows the log; then reboot, since a log can't be corrected", "the event logs and the TPM disagree: %s", boot.Mismatch)
	}
	return nil
}

func pcrs(n *Node) (all []diagnosis.Finding) {
	boot := n.Boot.Value
	switch {
	case !n.usesTPM():
		return nil
	case boot == nil || boot.LogProblem != "":
		return diagnosis.NotChecked("the event logs do not tell how the machine booted")
	}
	command := "systemctl restart kleidi && kleidi reseal   # after tpm.pcrs is removed from the configuration"
	if len(boot.Whole) > 0 {
		command = fmt.Sprintf("systemctl restart kleidi && kleidi reseal   # after tpm.pcrs: [%s] is in the configuration", list(boot.Whole))
	}
	if len(boot.Open) > 0 && !n.Config.TPM.AnySignedBoot {
		all = append(all, diagnosis.Found("pcrs/open", command, "PCR %s, which the KEK is sealed to, do not hold all of a boot of type %s: %s", list(boot.PCRs), boot.Type, strings.Join(boot.Open, "; "))...)
	}
	if len(boot.AtReset) > 0 {
		all = append(all, diagnosis.Found("pcrs/unmeasured", command, "nothing was measured into PCR %s, which the KEK is sealed to", list(boot.AtReset))...)
	}
	return all
}

func list(pcrs []int) string {
	var words []string
	for _, p := range pcrs {
		words = append(words, strconv.Itoa(p))
	}
	return strings.Join(words, ", ")
}

func phase(n *Node) []diagnosis.Finding {
	boot := n.Boot.Value
	switch {
	case !n.usesTPM():
		return nil
	case boot == nil || boot.LogProblem != "":
		return diagnosis.NotChecked("the event logs do not tell the phase of the boot")
	case boot.Restart != "":
		return diagnosis.Found("phase/restarted", "systemctl reboot", "%s", boot.Restart)
	case boot.Phase != "" && n.Config.TPM.Phase != "" && boot.Phase != n.Config.TPM.Phase:
		return diagnosis.Found("phase/other", "systemctl is-system-running --wait   # then look again; if it stays so, set tpm.phase", "the boot is in phase %q, and slots are made in phase %q", boot.Phase, n.Config.TPM.Phase)
	}
	return nil
}

// rootVerified looks for verification by the kernel itself: dm-verity below the root file
// system, or an IMA policy that appraises executed files.
func rootVerified(n *Node) []diagnosis.Finding {
	line := " " + n.line("/proc/cmdline") + " "
	if line == "  " {
		return diagnosis.NotChecked("the kernel's command line can't be read")
	}
	for _, word := range []string{" roothash=", " systemd.verity_root_data=", " ima_appraise=enforce ", " verity.root="} {
		if strings.Contains(line, word) {
			return nil
		}
	}
	return diagnosis.Found("root/unverified", "cat /proc/cmdline   # roothash= is wanted; else encrypt the disk with systemd-cryptenroll --tpm2-device=auto", "the boot does not verify the root file system (no dm-verity, no IMA appraisal on the kernel's command line)")
}

// bootFiles are the files from which the machine boots.
var bootFiles = []string{"/boot/grub/grub.cfg", "/boot/vmlinuz-*", "/boot/initrd.img-*", "/efi/EFI/Linux/*.efi", "/boot/EFI/Linux/*.efi", "/boot/efi/EFI/Linux/*.efi",
	"/boot/efi/EFI/*/shim*.efi", "/boot/efi/EFI/*/grub*.efi", "/efi/EFI/systemd/*.efi", "/boot/efi/EFI/systemd/*.efi"}

// nextBoot finds that no keyslot is for the next boot. The values of a unified kernel image
// are predicted; of other files it is known only that they changed since the running boot.
func nextBoot(n *Node) []diagnosis.Finding {
	has := func(use string) bool {
		return slices.ContainsFunc(n.Status.Slots, func(s slot) bool { return s.Use == use })
	}
	if !n.usesTPM() || n.Status.Suspension != nil || has("signed") {
		return nil
	}
	files, ok := n.NewBootFiles()
	if !ok {
		return diagnosis.NotChecked("/proc/stat does not tell when the machine booted")
	}
	var command string
	var changed []string
	for _, file := range files {
		said := file
		switch next := n.Next[file]; {
		case next.Value != nil && (next.Value.Prepared || len(next.Value.Moved) == 0), next.Value == nil && has("next"):
			continue
		case next.Value != nil:
			said = fmt.Sprintf("%s (its boot has other values in PCR %s, and opens no keyslot)", file, list(next.Value.Moved))
		case next.Why != "":
			said = fmt.Sprintf("%s (its boot is not predicted: %s)", file, next.Why)
		}
		if changed = append(changed, said); command == "" {
			command = "kleidi-next-boot grub"
			if strings.HasSuffix(file, ".efi") {
				command = "kleidi-next-boot uki " + file
			}
		}
	}
	if changed == nil {
		return nil
	}
	return diagnosis.Found("next-boot/unprepared", command, "since this boot %s has changed", strings.Join(changed, ", "))
}

// NewBootFiles returns the files from which the machine boots that are newer than the
// running boot, if the time of that boot is known.
func (n *Node) NewBootFiles() (newer []string, ok bool) {
	booted, ok := n.booted()
	if !ok {
		return nil, false
	}
	for _, pattern := range bootFiles {
		names, _ := filepath.Glob(n.path(pattern))
		for _, name := range names {
			if st, err := os.Stat(name); err == nil && st.ModTime().After(booted) {
				newer = append(newer, strings.TrimPrefix(name, n.Root))
			}
		}
	}
	return newer, true
}

// booted returns the time of the boot.
func (n *Node) booted() (time.Time, bool) {
	for line := range strings.Lines(n.line("/proc/stat")) {
		if text, ok := strings.CutPrefix(line, "btime "); ok {
			s, err := strconv.ParseInt(strings.TrimSpace(text), 10, 64)
			return time.Unix(s, 0), err == nil
		}
	}
	return time.Time{}, false
}
