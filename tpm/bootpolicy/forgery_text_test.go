package bootpolicy

import (
	"crypto"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

const ukiCommandLine = "console=ttyS0,115200 quiet panic=-1 mboot=a"

// written writes the entry with a note as another one.
func written(pcr int, noted string, e Entry) func(p *BootPolicy) {
	return func(p *BootPolicy) {
		for i := range p.PCRs[pcr].Sequences[0] {
			if strings.Contains(p.PCRs[pcr].Sequences[0][i].Note, noted) {
				p.PCRs[pcr].Sequences[0][i] = e
			}
		}
	}
}

func section(measured, data string) func(t *testing.T, l *eventlog.Log) {
	return func(t *testing.T, l *eventlog.Log) {
		l.Events[find(t, l, 11, "section .cmdline")] = measure(l, 11, eventlog.IPL, measured, data)
	}
}

var texts = []forgery{
	{name: "the stub's command line, by its text", policy: written(11, "section .cmdline", Entry{Form: FormText, Value: ukiCommandLine}),
		forge: func(*testing.T, *eventlog.Log) {}},
	{name: "load options, by their text", policy: func(p *BootPolicy) {
		p.PCRs[9] = Rule{Sequences: [][]Entry{{{Form: FormText, Value: ukiCommandLine},
			{Form: FormDigest, Value: "8bc65108deea545c3d3454b93b7c9b291580d6f1a01ac5031afde1d3955f3fe9"}}}}
	}, forge: func(*testing.T, *eventlog.Log) {}},
	{name: "other command line", policy: written(11, "section .cmdline", Entry{Form: FormText, Value: ukiCommandLine}),
		forge: section(ukiCommandLine+" init=/bin/sh", wide(".cmdline\x00")), refused: "pcrs.11.sequences[0][5]", problem: "kernel command line changed"},
	{name: "other command line, logged as the allowed text", policy: written(11, "section .cmdline", Entry{Form: FormText, Value: ukiCommandLine}),
		forge: section("init=/bin/sh", ukiCommandLine), refused: "pcrs.11.sequences[0][5]"},
}

const grubArguments = "console=ttyS0,115200 quiet panic=-1 mboot=a"

func grubCommandLine(p *BootPolicy) {
	allowList(8)(p)
	r := p.PCRs[8]
	for i, e := range r.Allowed {
		if strings.Contains(e.Note, "/vmlinuz") {
			r.Allowed[i] = Entry{Form: FormCommandLine, Value: grubArguments}
		}
	}
}

// grub replaces the events of GRUB that load and start the kernel.
func grub(load, start eventlog.Event) func(t *testing.T, l *eventlog.Log) {
	return func(t *testing.T, l *eventlog.Log) {
		l.Events[find(t, l, 8, "grub_cmd: linux")] = load
		l.Events[find(t, l, 8, "kernel_cmdline")] = start
	}
}

var allBanks = &eventlog.Log{Banks: []crypto.Hash{crypto.SHA1, crypto.SHA256, crypto.SHA384, crypto.SHA512}}

// said is an event of GRUB, with its text logged under a prefix.
func said(prefix, text string) eventlog.Event {
	return measure(allBanks, 8, eventlog.IPL, text, prefix+text+"\x00")
}

var commandLines = []forgery{
	{name: "GRUB: command line", log: "shim-grub-secureboot", policy: grubCommandLine, forge: func(*testing.T, *eventlog.Log) {}},
	{name: "GRUB: other kernel, same arguments", log: "shim-grub-secureboot", policy: grubCommandLine,
		forge: grub(said("grub_cmd: ", "linux /vmlinuz-7 "+grubArguments), said("kernel_cmdline: ", "/vmlinuz-7 "+grubArguments))},
	{name: "GRUB: measured with its zero", log: "shim-grub-secureboot", policy: grubCommandLine,
		forge: grub(measure(allBanks, 8, eventlog.IPL, "linux (hd0)/k "+grubArguments+"\x00", "grub_cmd: linux (hd0)/k "+grubArguments+"\x00"),
			said("kernel_cmdline: ", "(hd0)/k "+grubArguments))},
	{name: "GRUB: other arguments", log: "shim-grub-secureboot", policy: grubCommandLine,
		forge:   grub(said("grub_cmd: ", "linux /vmlinuz "+grubArguments+" init=/bin/sh"), said("kernel_cmdline: ", "/vmlinuz "+grubArguments+" init=/bin/sh")),
		refused: "pcrs.8.allowed", problem: "GRUB's kernel line is new"},
	{name: "GRUB: no arguments", log: "shim-grub-secureboot", policy: grubCommandLine,
		forge: grub(said("grub_cmd: ", "linux /vmlinuz"), said("kernel_cmdline: ", "/vmlinuz")), refused: "pcrs.8.allowed"},
	{name: "GRUB: other arguments, logged as the allowed ones", log: "shim-grub-secureboot", policy: grubCommandLine,
		forge: grub(measure(allBanks, 8, eventlog.IPL, "linux /vmlinuz evil", "grub_cmd: linux /vmlinuz "+grubArguments),
			measure(allBanks, 8, eventlog.IPL, "/vmlinuz evil", "kernel_cmdline: /vmlinuz "+grubArguments)),
		refused: "pcrs.8.allowed"},
	{name: "GRUB: other arguments, and the allowed ones typed as a command and relabelled", log: "shim-grub-secureboot", policy: grubCommandLine,
		forge: func(t *testing.T, l *eventlog.Log) {
			grub(said("grub_cmd: ", "linux /vmlinuz evil"), said("grub_cmd: ", "/vmlinuz evil"))(t, l)
			insert(l, find(t, l, 8, "grub_cmd: linux"), said("kernel_cmdline: ", "/vmlinuz "+grubArguments))
		}, refused: "pcrs.8.allowed"},
	{name: "GRUB: another command that loads", log: "shim-grub-secureboot", policy: grubCommandLine,
		forge:   grub(said("grub_cmd: ", "linux16 /vmlinuz "+grubArguments), said("kernel_cmdline: ", "/vmlinuz "+grubArguments)),
		refused: "pcrs.8.allowed"},
	{name: "GRUB: chainloader", log: "shim-grub-secureboot", policy: grubCommandLine,
		forge:   grub(said("grub_cmd: ", "chainloader /evil.efi "+grubArguments), said("kernel_cmdline: ", "/vmlinuz "+grubArguments)),
		refused: "pcrs.8.allowed"},
	{name: "GRUB: another command with the allowed arguments", log: "shim-grub-secureboot", policy: grubCommandLine, forge: func(t *testing.T, l *eventlog.Log) {
		insert(l, find(t, l, 8, "grub_cmd: linux"), said("grub_cmd: ", "source "+grubArguments))
	}, refused: "pcrs.8.allowed", problem: "GRUB command is new"},
	{name: "GRUB: command line in its place of a sequence", log: "shim-grub-secureboot",
		policy: written(8, "/vmlinuz", Entry{Form: FormCommandLine, Value: grubArguments}), forge: func(*testing.T, *eventlog.Log) {}},
	{name: "GRUB: another command before it", log: "shim-grub-secureboot",
		policy: written(8, "/vmlinuz", Entry{Form: FormCommandLine, Value: grubArguments}), forge: func(t *testing.T, l *eventlog.Log) {
			insert(l, find(t, l, 8, "grub_cmd: linux"), said("grub_cmd: ", "set x=y"))
		}, refused: "pcrs.8.sequences[0]", problem: "GRUB command is new"},
	{name: "GRUB: other initrd", log: "shim-grub-secureboot", forge: func(t *testing.T, l *eventlog.Log) {
		l.Events[find(t, l, 9, "/initrd.gz")] = measure(l, 9, eventlog.IPL, "other", "/initrd.gz\x00")
	}, refused: "pcrs.9.sequences[0][2]", problem: "initrd"},
	{name: "GRUB: key enrolled in shim", log: "shim-grub-secureboot", forge: func(t *testing.T, l *eventlog.Log) {
		l.Events[find(t, l, 14, "MokList")] = measure(l, 14, eventlog.IPL, "other", "MokList\x00")
	}, refused: "pcrs.14.sequences[0][0]", problem: "shim's key list"},
}
