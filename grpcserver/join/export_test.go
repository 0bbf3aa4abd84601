package join

import (
	"fmt"

	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/beezy-dev/kleidi/grpcserver/internal/exchange"
	protocol "github.com/beezy-dev/kleidi/tpm/attest/exchange"
)

// Limits are the limits of a join, by what they limit.
func Limits() map[string]string {
	return map[string]string{
		"a message to V":                           fmt.Sprintf("%d KiB", exchange.MaxMessage>>10),
		"the part of a log in one message":         fmt.Sprintf("%d KiB", exchange.PartSize>>10),
		"each event log":                           fmt.Sprintf("%d MiB", protocol.MaxLog>>20),
		"a grant":                                  fmt.Sprintf("%d MiB", maxGrant>>20),
		"import slots of one KEK":                  fmt.Sprint(maxSlots),
		"bootstrap files":                          fmt.Sprint(maxNames),
		"bootstrap files together":                 fmt.Sprintf("%d KiB", MaxFiles>>10),
		"the name of a bootstrap file":             fmt.Sprintf("%d bytes", maxName),
		"`mac` of `done`":                          fmt.Sprintf("%d bytes", maxMAC),
		"`reason` of a refusal":                    fmt.Sprintf("%d characters", exchange.MaxReason),
		"`hint` of a refusal":                      fmt.Sprintf("%d characters", exchange.MaxHint),
		"approvals in V's memory":                  fmt.Sprint(maxApprovals),
		"connections without a proof":              fmt.Sprint(exchange.MaxUnproven),
		"connections without a proof of one peer":  fmt.Sprint(exchange.MaxPeerUnproven),
		"the time to `hello`":                      fmt.Sprint(exchange.HelloTimeout),
		"the time from the challenge to the proof": fmt.Sprint(exchange.ProofTimeout),
		"a join": fmt.Sprint(DefaultTimeout),
	}
}

// Service names the service and the method.
func Service() (name, method string) { return service.Name, service.Method }

// Messages describes the messages in both directions.
func Messages() protoreflect.MessageDescriptors { return File_join_proto.Messages() }
