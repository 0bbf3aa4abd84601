//go:build cgo

package cryptoki

/*
#cgo linux LDFLAGS: -ldl
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned long ulong_t; // CK_ULONG

// A CK_FUNCTION_LIST: the functions of PKCS#11 v2.40 in the standard's order.
typedef struct {
	unsigned char version[2];
	void *function[68];
} functions;
enum { encrypt = 30, decrypt = 34, wrap_key = 60 };

typedef ulong_t (*get_function_list)(functions **);
typedef ulong_t (*single_part)(ulong_t session, void *in, ulong_t in_size, void *out, ulong_t *out_size);
typedef struct {
	ulong_t type;
	void *parameter;
	ulong_t size;
} mechanism_t;
typedef ulong_t (*wrap)(ulong_t session, mechanism_t *, ulong_t wrapping, ulong_t key, void *out, ulong_t *out_size);

// kleidi_load loads a module and never unloads it. It returns NULL, or an error text,
// which the caller frees.
static char *kleidi_load(const char *path, functions **list) {
	void *module = dlopen(path, RTLD_NOW | RTLD_LOCAL);
	if (module == NULL) {
		const char *why = dlerror();
		return strdup(why ? why : "dlopen failed");
	}
	get_function_list get = (get_function_list)dlsym(module, "C_GetFunctionList");
	if (get == NULL) {
		dlclose(module);
		return strdup("it is a shared library, but not a PKCS#11 module: it has no C_GetFunctionList");
	}
	if (get(list) != 0 || *list == NULL)
		return strdup("C_GetFunctionList fails");
	return NULL;
}

static ulong_t kleidi_single_part(functions *list, int which, ulong_t session, void *in, ulong_t in_size, void *out, ulong_t *out_size) {
	return ((single_part)list->function[which])(session, in, in_size, out, out_size);
}

static ulong_t kleidi_wrap_key(functions *list, ulong_t session, ulong_t type, ulong_t wrapping, ulong_t key, void *out, ulong_t *out_size) {
	mechanism_t m = {type, NULL, 0};
	return ((wrap)list->function[wrap_key])(session, &m, wrapping, key, out, out_size);
}

// kleidi_scrub overwrites the blocks that this thread has just freed: malloc returns the
// block that was freed last first, and glibc keeps at most seven blocks of a size per
// thread. Then it copies zeros in the way in which keys are copied, to overwrite the
// registers.
static void kleidi_scrub(void) {
	enum { sizes = 64, each = 8 };
	static __thread void *block[sizes][each];
	for (size_t i = 0; i < sizes; i++)
		for (size_t j = 0; j < each; j++)
			if ((block[i][j] = malloc(24 + 16 * i)) != NULL)
				explicit_bzero(block[i][j], 24 + 16 * i);
	for (size_t i = 0; i < sizes; i++)
		for (size_t j = 0; j < each; j++)
			free(block[i][j]);
	static const char zeros[512];
	static __thread char sink[sizeof zeros];
	for (volatile size_t n = 1; n <= sizeof zeros; n++)
		memcpy(sink, zeros, n);
}

// kleidi_preemption blocks or unblocks the signal by which Go preempts a thread. The
// signal would save the registers, with parts of a key in them, to ordinary memory.
static void kleidi_preemption(int how) {
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGURG);
	pthread_sigmask(how, &set, NULL);
}
*/
import "C"

import (
	"errors"
	"runtime"
	"unsafe"

	"github.com/miekg/pkcs11"

	"github.com/beezy-dev/kleidi/hsm/internal/keyslot"
)

// Functions holds the functions of a module that kleidi calls, under PKCS#11's names.
// *pkcs11.Ctx implements it.
type Functions interface {
	Initialize(...pkcs11.InitializeOption) error
	Finalize() error
	GetSlotList(tokenPresent bool) ([]uint, error)
	GetTokenInfo(slotID uint) (pkcs11.TokenInfo, error)
	GetMechanismInfo(slotID uint, m []*pkcs11.Mechanism) (pkcs11.MechanismInfo, error)
	OpenSession(slotID, flags uint) (pkcs11.SessionHandle, error)
	CloseSession(pkcs11.SessionHandle) error
	Login(sh pkcs11.SessionHandle, userType uint, pin string) error
	Logout(pkcs11.SessionHandle) error
	FindObjectsInit(pkcs11.SessionHandle, []*pkcs11.Attribute) error
	FindObjects(sh pkcs11.SessionHandle, most int) ([]pkcs11.ObjectHandle, bool, error)
	FindObjectsFinal(pkcs11.SessionHandle) error
	GetAttributeValue(pkcs11.SessionHandle, pkcs11.ObjectHandle, []*pkcs11.Attribute) ([]*pkcs11.Attribute, error)
	GenerateKey(pkcs11.SessionHandle, []*pkcs11.Mechanism, []*pkcs11.Attribute) (pkcs11.ObjectHandle, error)
	CreateObject(pkcs11.SessionHandle, []*pkcs11.Attribute) (pkcs11.ObjectHandle, error)
	DestroyObject(pkcs11.SessionHandle, pkcs11.ObjectHandle) error
	EncryptInit(pkcs11.SessionHandle, []*pkcs11.Mechanism, pkcs11.ObjectHandle) error
	Encrypt(sh pkcs11.SessionHandle, message []byte) ([]byte, error)
	DecryptInit(pkcs11.SessionHandle, []*pkcs11.Mechanism, pkcs11.ObjectHandle) error
	Decrypt(sh pkcs11.SessionHandle, ciphertext []byte) ([]byte, error)
	WrapKey(sh pkcs11.SessionHandle, m []*pkcs11.Mechanism, wrapping, key pkcs11.ObjectHandle) ([]byte, error)
	UnwrapKey(sh pkcs11.SessionHandle, m []*pkcs11.Mechanism, unwrapping pkcs11.ObjectHandle, wrapped []byte, a []*pkcs11.Attribute) (pkcs11.ObjectHandle, error)
}

// Binding is miekg's binding with other implementations of three calls. miekg's ask the module
// for the size of the output first, which NSS softokn gets wrong for key wrapping, and
// leave a copy of the output in freed memory.
type Binding struct {
	*pkcs11.Ctx
	list *C.functions
}

// load loads a module. miekg's binding drops the text of dlerror and the result of
// C_GetFunctionList, so load checks both first.
func load(path string) (*Binding, error) {
	name := C.CString(path)
	defer C.free(unsafe.Pointer(name))
	c := &Binding{}
	if why := C.kleidi_load(name, &c.list); why != nil {
		defer C.free(unsafe.Pointer(why))
		return nil, errors.New(C.GoString(why))
	}
	if c.Ctx = pkcs11.New(path); c.Ctx == nil {
		return nil, errors.New("dlopen failed")
	}
	return c, nil
}

// outputSize is the size of a buffer for a ciphertext or a plaintext in bytes.
const outputSize = 2 * keyslot.MaxCiphertext

// Encrypt is C_Encrypt.
func (c *Binding) Encrypt(sh pkcs11.SessionHandle, message []byte) ([]byte, error) {
	return c.singlePart(C.encrypt, sh, message)
}

// Decrypt is C_Decrypt. The caller clears the whole capacity of the result.
func (c *Binding) Decrypt(sh pkcs11.SessionHandle, ciphertext []byte) ([]byte, error) {
	return c.singlePart(C.decrypt, sh, ciphertext)
}

func (c *Binding) singlePart(which C.int, sh pkcs11.SessionHandle, in []byte) ([]byte, error) {
	out := make([]byte, outputSize)
	n := C.ulong_t(len(out))
	rv := C.kleidi_single_part(c.list, which, C.ulong_t(sh), unsafe.Pointer(&in[0]), C.ulong_t(len(in)), unsafe.Pointer(&out[0]), &n)
	return returned(out, n, rv)
}

// WrapKey is C_WrapKey with a mechanism that has no parameter.
func (c *Binding) WrapKey(sh pkcs11.SessionHandle, m []*pkcs11.Mechanism, wrapping, key pkcs11.ObjectHandle) ([]byte, error) {
	out := make([]byte, outputSize)
	n := C.ulong_t(len(out))
	rv := C.kleidi_wrap_key(c.list, C.ulong_t(sh), C.ulong_t(m[0].Mechanism), C.ulong_t(wrapping), C.ulong_t(key), unsafe.Pointer(&out[0]), &n)
	return returned(out, n, rv)
}

func returned(out []byte, n, rv C.ulong_t) ([]byte, error) {
	if rv != pkcs11.CKR_OK {
		clear(out)
		return nil, pkcs11.Error(rv)
	}
	if int(n) > len(out) {
		clear(out)
		return nil, pkcs11.Error(pkcs11.CKR_GENERAL_ERROR)
	}
	return out[:n], nil
}

// scrubbed runs f, which calls a module, and erases what f leaves of keys on this thread.
// miekg's binding copies PINs, and the KEK of C_CreateObject and C_GetAttributeValue,
// through small blocks from malloc, and frees them without erasing them. Modules may do
// the same. The free lists of malloc belong to the thread.
func scrubbed(f func()) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	C.kleidi_preemption(C.SIG_BLOCK)
	defer C.kleidi_preemption(C.SIG_UNBLOCK)
	defer C.kleidi_scrub()
	f()
}

// cString returns s in C memory, or nil for "", and a function that frees it.
func cString(s string) (p unsafe.Pointer, free func()) {
	if s == "" {
		return nil, func() {}
	}
	p = unsafe.Pointer(C.CString(s))
	return p, func() { C.free(p) }
}
