package measuredboot

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/beezy-dev/kleidi/e2e/measuredboot/guest/wire"
	"github.com/beezy-dev/kleidi/e2e/node"
)

// run powers the machine on and waits until it is off. Firmware that refuses the image
// shows its menu and stays there; run then switches the machine off.
func (m *machine) run(disk string, b *booted) error {
	ctx, cancel := context.WithTimeout(context.Background(), bootTime)
	defer cancel()
	begin := time.Now()
	defer func() { b.took = time.Since(begin) }()
	socket, console := m.path("tpm.sock"), m.path("console")
	if err := os.Remove(console); err != nil && !os.IsNotExist(err) {
		return err
	}
	listener, err := node.Listener(socket)
	if err != nil {
		return err
	}
	defer listener.Close()
	swtpm := exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+m.path("tpm"),
		"--ctrl", "type=unixio,fd=3", "--terminate", "--log", "file="+m.path("swtpm.log"))
	swtpm.ExtraFiles = []*os.File{listener}
	tpm, err := start(swtpm)
	if err != nil {
		return err
	}
	defer tpm.kill() // swtpm has ended with QEMU, unless QEMU never connected
	listener.Close() // otherwise QEMU would not notice the end of swtpm
	qemu, err := start(exec.Command("qemu-system-x86_64", m.arguments(disk, socket, console)...))
	if err != nil {
		return err
	}
	defer qemu.kill()
	err = m.watch(ctx, qemu, b)
	if b.started = strings.Contains(b.console, wire.Seen); err == nil && !b.started {
		b.said = refusal(b.console)
		if b.said == "" {
			err = fmt.Errorf("the machine went off, and its init was not started")
		}
	}
	if err != nil {
		return fmt.Errorf("%w\n%s\nthe console:\n%s", err, &qemu.output, tail(b.console, 40))
	}
	if !b.started {
		return nil
	}
	return tpm.wait(ctx) // swtpm has saved its state when it has ended
}

// watch reads the console until the machine is off.
func (m *machine) watch(ctx context.Context, qemu *process, b *booted) error {
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		var off bool
		var failed error
		select {
		case <-qemu.ended:
			off = true
		case <-ctx.Done():
			off, failed = true, fmt.Errorf("the machine is not off after %s", bootTime)
		case <-tick.C:
		}
		text, err := os.ReadFile(m.path("console"))
		if err != nil && !os.IsNotExist(err) {
			return err
		}
		b.console = string(text)
		if off || refusal(b.console) != "" {
			return failed
		}
	}
}

// refusal returns the firmware's message if it does not start an image.
func refusal(console string) string {
	if strings.Contains(console, wire.Seen) {
		return ""
	}
	for _, said := range []string{"Access Denied", "Security Violation"} {
		if strings.Contains(console, said) {
			return said
		}
	}
	return ""
}

func (m *machine) arguments(disk, tpm, console string) []string {
	args := []string{"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-vga", "none",
		// /dev/kvm may exist and still fail with this firmware
		"-accel", "tcg", "-machine", "q35,smm=on", "-cpu", "Nehalem", "-smp", "1", "-m", "512",
		"-global", "driver=cfi.pflash01,property=secure,value=on", "-global", "ICH9-LPC.disable_s3=1",
		"-drive", "if=pflash,unit=0,format=raw,readonly=on,file=" + codeImage,
		"-drive", "if=pflash,unit=1,format=raw,file=" + m.variables,
		"-serial", "file:" + console,
		"-chardev", "socket,id=tpm,path=" + tpm, "-tpmdev", "emulator,id=tpm0,chardev=tpm", "-device", "tpm-crb,tpmdev=tpm0",
		"-object", "rng-random,id=rng0,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng0",
		"-drive", "if=none,id=boot,format=raw,readonly=on,file=" + disk}
	if len(m.handed) > 0 {
		args = append(args, m.handed...)
	} else {
		args = append(args, "-device", "virtio-blk-pci,drive=boot,bootindex=0")
	}
	if m.network { // no ROM, since the firmware boots from the disk
		args = append(args, "-netdev", "user,id=net,net="+wire.Net, "-device", "virtio-net-pci,netdev=net,romfile=")
	}
	for _, name := range []string{wire.Tools, wire.Request, wire.State} {
		args = append(args, "-drive", "if=none,id="+name+",format=raw,file="+m.path(name), "-device", "virtio-blk-pci,drive="+name+",serial="+name)
	}
	return args
}

// process is a program that ends with this one, even if this one is killed.
type process struct {
	cmd    *exec.Cmd
	output strings.Builder
	ended  chan struct{}
}

func start(cmd *exec.Cmd) (*process, error) {
	p := &process{cmd: cmd, ended: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = &p.output, &p.output
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	go func() {
		// The kernel sends Pdeathsig when the thread that started the child ends
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // its files show how it ended
			close(p.ended)
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("%s: %w", cmd.Args[0], err)
	}
	return p, nil
}

func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	<-p.ended
}

func (p *process) wait(ctx context.Context) error {
	select {
	case <-p.ended:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s does not end", p.cmd.Args[0])
	}
}
