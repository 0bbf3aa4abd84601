package main

import (
	"encoding/json"
	"os/exec"
	"strconv"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
)

// slotName puts the name of a slot into a variable: slot VARIABLE TYPE N, where N counts the
// slots of that type from 1.
func (h *host) slotName(ts *testscript.TestScript, args []string) error {
	if len(args) != 3 {
		return broken("slot VARIABLE TYPE N")
	}
	want, err := strconv.Atoi(args[2])
	if err != nil {
		return broken("slot: %w", err)
	}
	out, err := exec.Command(binary, "--config", h.path("config.yaml"), "slot", "list", "-o", "json").Output()
	if err != nil {
		return broken("slot list: %w", err)
	}
	var slots []admin.SlotReport
	if err := json.Unmarshal(out, &slots); err != nil {
		return broken("slot list: %w", err)
	}
	for _, s := range slots {
		if s.Type != args[1] {
			continue
		}
		if want--; want == 0 {
			ts.Setenv(args[0], s.Name)
			return nil
		}
	}
	return broken("there is no such slot: %s", out)
}
