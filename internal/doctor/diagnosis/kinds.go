package diagnosis

// Kind is the text common to all findings of a kind.
type Kind struct {
	Note bool // it can wait
	Why  string
}

// Reasons that several kinds share.
const (
	whyNoSecrets = "kube-apiserver can't read or write Secrets"
	whyLastWay   = "one fewer way leads to the KEK"
	whySwap      = "swapped memory ends up on the disk, where the TPM does not protect it"
)

// Kinds are all kinds of findings, by the check and the fault.
var Kinds = map[string]Kind{
	"configuration/refused": {false, "kleidi serve does not start with it"},

	"tpm/missing":               {false, "the KEK is sealed in the TPM: without it only the recovery identity opens the keyring"},
	"tpm/version-1.2":           {false, "kleidi seals to a TPM 2.0; a TPM 1.2 can't keep the KEK"},
	"tpm/silent":                {false, "kleidi asks the TPM at each start, and opens nothing without an answer"},
	"tpm/lockout":               {true, "kleidi's own objects are exempt, but every other program that uses this TPM is refused until the lockout ends"},
	"tpm/wrong-authorizations":  {true, "a program on this node gives the TPM wrong authorization values, and will lock out every program but kleidi"},
	"tpm-users/others":          {false, "with a copy of the keyring, these users can get the KEK"},
	"owner-authorization/empty": {true, "whoever may use the TPM can remove its epoch counter and the anchor in it; the node then stays locked until it is recovered"},

	"event-log/missing":     {false, "kleidi attests each boot by its event log, and opens nothing without it"},
	"event-log/unreadable":  {false, "kleidi attests each boot by its event log, and opens nothing without it"},
	"event-log/differs":     {false, "the log does not explain what the TPM has measured, so the next start of kleidi serve opens nothing"},
	"pcrs/open":             {false, "a boot that changes these parts still opens the KEK"},
	"pcrs/unmeasured":       {false, "a PCR into which nothing was measured has the same value in every boot, so it keeps no boot out"},
	"phase/other":           {true, "a KEK sealed in this phase does not open in the phase in which kleidi serve starts"},
	"phase/restarted":       {true, "a KEK sealed now would not open after the next boot"},
	"folders/missing":       {false, "kleidi serve creates its sockets and keeps its state there"},
	"files/readable":        {false, "whoever reads this file has what kleidi keeps from other users"},
	"files/writable":        {false, "whoever writes this file decides what kleidi does, so kleidi refuses the file"},
	"files/missing":         {false, "kleidi can't log in to the token or the server without it"},
	"disk/full":             {false, "a rotation and a reseal fail on a full disk, and an update of the keyring is lost"},
	"unit/weakened":         {false, "a line that switches the sandbox off lets whoever takes over kleidi serve reach the rest of the node"},
	"unit/overridden":       {true, "an update of the package does not change the lines that the override sets"},
	"unit/not-enabled":      {false, "after the next boot kube-apiserver finds no plugin"},
	"serve/stopped":         {false, whyNoSecrets},
	"serve/no-socket":       {false, "kube-apiserver finds no plugin"},
	"version/restart":       {false, "an update takes effect only after a restart; kube-apiserver's calls wait during the restart"},
	"keyring/locked":        {false, whyNoSecrets},
	"keyring/fallback":      {false, "the keyring is open now, and may not open at the next start"},
	"retired-keks/many":     {true, "with 256 retired KEKs no rotation can begin, not even after an intrusion"},
	"retired-keks/full":     {false, "no rotation can begin, not even after an intrusion"},
	"keyslots/refused":      {false, whyLastWay},
	"keyslots/untested":     {true, "without a test, nobody knows whether it opens before it is needed"},
	"keyslots/warning":      {true, "the reason for the warning can one day keep the keyslot from opening"},
	"recovery/missing":      {true, "if the TPM fails, or the machine boots differently, every Secret is lost"},
	"suspension/running":    {false, "until the suspension ends, boots that are not authorised open the KEK"},
	"debts/unrevoked":       {false, "whoever kept a copy of such a slot, and boots as the slot demands, gets the KEK"},
	"changed-outside/slots": {false, "whoever wrote them may have a way to the KEK"},
	"memory/unlocked":       {false, whySwap},
	"memory/process":        {false, whySwap},
	"memory/swap":           {false, whySwap},
	"memory/core":           {false, "a core file of kleidi serve holds the KEK"},
	"root/unverified":       {true, "whoever writes to the disk while the machine is off can replace kleidi, and gets the KEK at the next boot"},
	"sockets/uid":           {false, "kube-apiserver may not connect, so no Secret is read or written"},
	"sockets/folder":        {false, "kube-apiserver can't reach the socket, so no Secret is read or written"},

	"encryption-configuration/missing":     {false, "kube-apiserver encrypts nothing with kleidi"},
	"encryption-configuration/refused":     {false, "kube-apiserver does not start with it"},
	"encryption-configuration/not-first":   {false, "kube-apiserver writes with the first provider, so it encrypts nothing with kleidi"},
	"encryption-configuration/store":       {false, "a node could read the shared keyring only with a KEK that is in it"},
	"encryption-configuration/api-version": {false, "kleidi speaks only KMS v2, and kube-apiserver assumes v1 if the provider names no version"},
	"encryption-configuration/timeout":     {false, "kube-apiserver gives up before kleidi can answer, or waits so long that its own requests fail"},
	"encryption-configuration/endpoint":    {false, "kube-apiserver does not reach kleidi"},
	"encryption-configuration/identity":    {true, "whoever writes to etcd can plant a Secret in the clear, and kube-apiserver accepts it"},
	"encryption-configuration/mode":        {true, "this file holds other providers' keys in the clear, so only root should be able to read it"},
	"manifest/refused":                     {false, "kubelet starts no kube-apiserver with it, or one that does not ask kleidi"},
	"manifest/unpatched":                   {false, "kube-apiserver does not ask kleidi"},
	"kube-apiserver/old":                   {false, "KMS v2 is stable from Kubernetes 1.29 on; an older version needs a feature gate, and is not tested"},
	"kube-apiserver/never-called":          {false, "kube-apiserver encrypts nothing with kleidi"},
	"kube-apiserver/stale":                 {false, "kube-apiserver has lost kleidi: reads and writes end once its own cache does"},
	"kube-apiserver/errors":                {true, "calls to kleidi have failed since kube-apiserver started"},
	"kube-apiserver/key-ids":               {true, "kube-apiserver refuses a key ID of another form or one that flips back, and keeps the former one"},
	"kube-apiserver/other-configuration":   {false, "the running kube-apiserver encrypts as another file says: it was not restarted, or another node's file is different"},

	"cluster-store/unreachable": {false, "this node follows no change of the shared keyring, and its record grows old"},
	"cluster-store/removed":     {false, "the cluster has removed this node, which stays locked after its next start and can't read what the others encrypt from now on"},
	"cluster-store/forked":      {false, "the nodes have two keyrings, and neither half follows a change of the other"},
	"cluster-store/refused":     {false, "this node does not take the keyring in the cluster store: it was removed while it was down, or the keyring is damaged, forged or too old"},
	"cluster-store/record":      {false, "the other nodes wait for this node's record before they rotate, remove a node or prune"},
	"cluster-store/certificate": {false, "without a client certificate this node has no access to the cluster store"},
	"nodes/behind":              {false, "a rotation waits for the node, or goes on without it; then the node may not open what the others encrypt next"},
	"nodes/unfinished":          {false, "the node received the keyring and has not shown that it opened it: a rotation waits for it"},
	"nodes/problem":             {false, "the node may not open the keyring at its next start"},
	"nodes/version":             {true, "a newer keyring format is used only once every node reads it"},
	"approvals/open":            {true, "until the approval ends, the machine with this endorsement key receives the KEK if it boots as its boot policy says"},
	"approvals/expired":         {true, "the machine was to become a node, and did not"},
	"token/pin-locked":          {false, "kleidi can't log in to the token, so its keyslot does not open"},
	"token/pin-final-try":       {false, "one more wrong PIN locks the token, so kleidi gives it none, and its keyslot does not open"},
	"token/pin-count-low":       {true, "the token counts wrong PINs, and some more lock it; the right PIN resets the count"},
	"vault/token":               {false, "kleidi does not renew this token, and the keyslot does not open once the token has ended"},
	"vault/jwt":                 {false, "kleidi can't log in to Vault with a token that has ended"},
	"vault/certificate":         {false, "kleidi can't log in to Vault once its client certificate has ended"},
	"clock/behind":              {false, "certificates and approvals are judged by the clock, and a clock that was set back accepts those that have ended"},
	"clock/unsynchronised":      {true, "a clock that drifts ends certificates and approvals too early or too late"},
	"hooks/missing":             {true, "after an update the next boot is locked, unless kleidi reseal was told of it"},
	"hooks/not-executable":      {false, "a hook that can't be run is skipped silently, and the boot after the next update is locked"},
	"hooks/not-called":          {true, "the script is there, and no update of a kernel calls it"},
	"next-boot/unprepared":      {false, "the next boot differs from the present one, and no keyslot is for it: kleidi may then stay locked"},
	"leftovers/rotation":        {false, "until the rotation ends, new Secrets are encrypted under the former KEK, and no other rotation starts"},
	"leftovers/temporary":       {true, "a command was interrupted while it wrote; the file is of no use"},
}
