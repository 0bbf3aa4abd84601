# Targets: build build-pkcs11 build-fips fips demo run test e2e measuredboot lint fuzz bench bench/apiserver image image-dry packages packages-pkcs11 manifests release-dry. See CONTRIBUTING.md.

GO       ?= go
VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
# Asked once, so that a commit meanwhile does not give two targets different versions.
VERSION  := $(VERSION)
FUZZTIME ?= 30s
# The number of mutated event logs that `make fuzz` tries on the gate.
MUTATIONS ?= 1000000

# runtime/secret erases the traces of a computation on a key. Package seal uses it if
# the toolchain has it.
export GOEXPERIMENT ?= runtimesecret
GOBUILD  = CGO_ENABLED=0 $(GO) build -trimpath -ldflags "-s -w -X github.com/beezy-dev/kleidi/internal/version.build=$(VERSION)"

# The race detector needs a C compiler.
RACE     = $(if $(and $(shell command -v gcc),$(filter 1,$(shell $(GO) env CGO_ENABLED))),-race)
PACKAGES = $(shell $(GO) list ./... | grep -v /e2e/)

.PHONY: build build-pkcs11 build-fips fips fetch-demo fetch-test demo run test e2e measuredboot lint fuzz bench bench/apiserver image image-dry packages packages-pkcs11 manifests release-dry clean

build:
	$(GOBUILD) -o bin/kleidi ./cmd/kleidi

# Builds kleidi with PKCS#11, which needs a C compiler, and at run time the C library.
build-pkcs11:
	.ci/deps gcc
	CGO_ENABLED=1 $(GO) build -trimpath -ldflags "-s -w -X github.com/beezy-dev/kleidi/internal/version.build=$(VERSION)" -o bin/kleidi-pkcs11 ./cmd/kleidi

# Builds kleidi with the validated version of Go's FIPS 140-3 module, in FIPS mode from the start.
# docs/fips.md says what it covers.
build-fips:
	GOFIPS140=certified $(GOBUILD) -o bin/kleidi-fips ./cmd/kleidi

fips: build-fips
	.ci/deps swtpm
	.ci/fips

# Fetches all downloads of README's two commands, before anything is built or run. The rest
# of these commands needs no network: .ci/fresh cuts it off.
fetch-demo:
	.ci/deps swtpm
	$(GO) mod download

fetch-test:
	.ci/deps gcc swtpm openssl softhsm2-util pkcs11-tool nss $(if $(NOT_ROOT),,mkfs.ext4)
	$(GO) mod download

demo: fetch-demo build
	e2e/demo/demo.sh

run: build
	.ci/deps swtpm
	bin/kleidi dev

# These tests change users, mount disks or change the owners of files. CI runs them as root.
ROOT_TESTS = TestStrangersDontCrowdOut|TestSocketModeAndOwner|TestBadFolders|TestLiveSocketIsLeftAlone|TestPeers|$\
	TestOtherUsersAreRefused|TestFolders/foreign|TestFiles/foreign|TestFullDisk|TestReadOnlyDisk|TestPowerLoss|TestCut|TestScript/unit|$\
	TestScript/impostor|TestScript/http|TestImpostorsGetNothing|TestCheckFile|TestCheckFolder|TestCheckOpen|TestRemedyIsACommand|TestOpeners|TestStickyAbove|TestFaults/.*/module_(of|writable|in)
NOT_ROOT   = $(filter-out 0,$(shell id -u))

test: fetch-test
	$(GO) test -timeout 90m $(RACE) $(if $(NOT_ROOT),-skip '$(ROOT_TESTS)') $(TESTFLAGS) $(PACKAGES)
	@test "$$(id -u)" = 0 || echo 'not run, since they need root (sudo make test): $(ROOT_TESTS)'

# The needs of e2e/measuredboot, in addition to what its script `parts` fetches.
BOOT_TOOLS = qemu-system-x86_64 ovmf swtpm_setup sbsign mcopy sfdisk objcopy openssl

E2E_TOOLS = gcc swtpm age setpriv debootstrap systemd-nspawn rpm ip tpm2 softhsm2-util pkcs11-tool nss certutil postgres $(BOOT_TOOLS)

e2e: build
	.ci/deps $(E2E_TOOLS)
	TESTFLAGS='$(TESTFLAGS)' .ci/e2e

# Runs one suite, such as make e2e/kill
SUITES = $(sort $(patsubst %/,%,$(dir $(wildcard e2e/*/*_test.go))))
.PHONY: $(SUITES)
$(SUITES): e2e/%: build
	.ci/deps $(E2E_TOOLS)
	TESTFLAGS='$(TESTFLAGS)' .ci/e2e $*

# Boots all machines, and writes the results into docs/measured-boot.md.
measuredboot: build
	.ci/deps $(BOOT_TOOLS)
	$(GO) test -count=1 -timeout 180m ./e2e/measuredboot -update

lint:
	.ci/deps shellcheck
	.ci/lint

fuzz: build
	.ci/deps swtpm
	.ci/fuzz $(FUZZTIME) $(MUTATIONS)

bench: build
	.ci/deps gcc swtpm softhsm2-util
	$(GO) run ./e2e/bench -kleidi bin/kleidi $(BENCHFLAGS)

# Measures Secrets through real kube-apiservers. The first run builds them, which takes minutes.
bench/apiserver: build
	.ci/deps swtpm
	$(GO) run ./e2e/bench -kleidi bin/kleidi -apiserver $(BENCHFLAGS)

image:
	.ci/deps buildah jq qemu-aarch64-static swtpm softhsm2-util pkcs11-tool
	.ci/image $(VERSION)

# Pushes the images into a registry on loopback, signs and verifies them.
image-dry: image
	.ci/image-dry $(VERSION)

# Builds a .deb and an .rpm in bin/packages, with another kleidi if PACKAGED names one.
PACKAGED ?= bin/kleidi
packages: build
	rm -f bin/packages/kleidi_* bin/packages/kleidi-[0-9]*
	deploy/packages/build $(PACKAGED) $(VERSION) bin/packages

# The same for the kleidi with PKCS#11: kleidi-pkcs11. It needs the C library of this
# machine's distribution, or a later one.
packages-pkcs11: build-pkcs11
	rm -f bin/packages/kleidi-pkcs11[_-]*
	deploy/packages/build bin/kleidi-pkcs11 $(VERSION) bin/packages pkcs11

# Checks the Helm chart, manifests and workflows, without a cluster.
manifests:
	.ci/deps git jq
	.ci/manifests

# Makes a release in dist/, without publishing it.
release-dry:
	.ci/deps git jq
	.ci/release-dry

clean:
	rm -rf bin dist
