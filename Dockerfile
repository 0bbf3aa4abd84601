# Two images: the pure-Go kleidi alone in one, and one with PKCS#11, see docs/pkcs11.md:
#
#	docker build --build-arg VERSION=v1 .
#	docker build --build-arg VERSION=v1 --target pkcs11 .
#
# Both exist for linux/amd64 and linux/arm64, and both are compiled on the machine that
# builds: --platform linux/arm64. What is built with cgo then needs a cross compiler in
# GO_IMAGE, Debian's gcc-aarch64-linux-gnu: --build-arg CC=aarch64-linux-gnu-gcc
#
# The same commit gives the same image if the builder sets all times to SOURCE_DATE_EPOCH:
# buildah's --timestamp, or rewrite-timestamp=true of Docker's exporter.
#
# Every RUN is in exec form, so that the build stage needs no shell and can start
# from scratch with a mounted toolchain (.ci/image), where no base image can be pulled.

# What is built with cgo needs a glibc at least as new as that of GO_IMAGE, so both are
# of one Debian. It is Debian rather than a distroless base since a vendor's module comes
# as a package, or as an installer that wants a shell, and often wants more libraries;
# where a mounted module needs none, a distroless cc-debian13 as BASE_IMAGE is enough.
ARG GO_IMAGE=golang:1.26-trixie
ARG BASE_IMAGE=debian:trixie-slim
ARG VERSION=unknown
ARG REVISION=unknown

FROM --platform=$BUILDPLATFORM ${GO_IMAGE} AS source
ARG VERSION
ARG TARGETARCH
ENV GOTOOLCHAIN=local GOMODCACHE=/go/pkg/mod GOCACHE=/go/cache GOEXPERIMENT=runtimesecret GOOS=linux GOARCH=$TARGETARCH \
    GOFLAGS="-trimpath -buildvcs=false '-ldflags=-s -w -X github.com/beezy-dev/kleidi/internal/version.build=${VERSION}'"
# WORKDIR makes the folder; the compiler needs /tmp
WORKDIR /tmp
WORKDIR /src
COPY . .

FROM source AS build-pkcs11
ARG CC=gcc
ENV CGO_ENABLED=1 CC=$CC
RUN ["/usr/local/go/bin/go", "build", "-o", "/out/kleidi", "./cmd/kleidi"]

FROM ${BASE_IMAGE} AS pkcs11
ARG VERSION
ARG REVISION
LABEL org.opencontainers.image.title="kleidi with PKCS#11" \
      org.opencontainers.image.description="KMS v2 provider for Kubernetes: the KEK is sealed to the node's TPM, or wrapped by a PKCS#11 token" \
      org.opencontainers.image.url="https://github.com/beezy-dev/kleidi" \
      org.opencontainers.image.source="https://github.com/beezy-dev/kleidi" \
      org.opencontainers.image.documentation="https://github.com/beezy-dev/kleidi/tree/main/docs" \
      org.opencontainers.image.vendor="beezy.dev" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build-pkcs11 /out/kleidi /kleidi
# root: as below
ENTRYPOINT ["/kleidi"]
CMD ["serve"]

FROM source AS build
ENV CGO_ENABLED=0
RUN ["/usr/local/go/bin/go", "build", "-o", "/out/kleidi", "./cmd/kleidi"]

# The last stage is what is built without --target.
FROM scratch
ARG VERSION
ARG REVISION
LABEL org.opencontainers.image.title="kleidi" \
      org.opencontainers.image.description="KMS v2 provider for Kubernetes: the KEK is sealed to the node's TPM" \
      org.opencontainers.image.url="https://github.com/beezy-dev/kleidi" \
      org.opencontainers.image.source="https://github.com/beezy-dev/kleidi" \
      org.opencontainers.image.documentation="https://github.com/beezy-dev/kleidi/tree/main/docs" \
      org.opencontainers.image.vendor="beezy.dev" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /out/kleidi /kleidi
# root: the device, the state folder and the sockets belong to it. A kleidi that needs none
# of them, such as kleidi verifier with files of its own, runs as any user.
ENTRYPOINT ["/kleidi"]
CMD ["serve"]
