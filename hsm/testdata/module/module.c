// A PKCS#11 module for tests: SoftHSM's, with habits that it lacks and others have.
// It counts wrong PINs, reports that as the standard's flags say, and locks at the
// third, or at the $KLEIDI_TEST_MOST-th (kept in the file $KLEIDI_TEST_TRIES). With
// $KLEIDI_TEST_OWN_IV it takes no IV for AES-GCM but zeros, and writes one of its own
// in their place. And while the file $KLEIDI_TEST_FAULT holds one of these words:
//
//	slow         it does not answer as it encrypts or decrypts
//	killed       it ends the session that encrypts or decrypts
//	killed-once  it does so once, and empties the file
//	removed      the token is taken out as it encrypts or decrypts: "gone" is put into
//	             the file
//	gone         no token is there
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef unsigned long ulong_t;
typedef struct {
	unsigned char version[2];
	void *function[68];
} functions;
enum { get_token_info = 6, close_session = 13, login = 18, encrypt_init = 29, decrypt_init = 33 };

typedef struct {
	unsigned char *iv;
	ulong_t iv_size, iv_bits;
	void *aad;
	ulong_t aad_size, tag_bits;
} gcm;
typedef struct {
	ulong_t type;
	void *parameter;
	ulong_t size;
} mechanism;
typedef struct {
	unsigned char label[32], manufacturer[32], model[16], serial[16];
	ulong_t flags;
} token_info; // its beginning

enum { user_pin_count_low = 0x10000, user_pin_final_try = 0x20000, user_pin_locked = 0x40000 };
enum { ckr_device_error = 0x30, ckr_device_removed = 0x32, ckr_mechanism_param_invalid = 0x71, ckr_pin_incorrect = 0xa0, ckr_pin_locked = 0xa4, ckr_token_not_present = 0xe0 };
enum { aes_gcm = 0x1087 };

static functions *real, mine;

static int most(void) {
	const char *n = getenv("KLEIDI_TEST_MOST");
	return n == NULL ? 3 : atoi(n);
}

// fault reports whether that is the fault of now.
static int fault(const char *name) {
	char word[32] = "";
	const char *path = getenv("KLEIDI_TEST_FAULT");
	FILE *f = path == NULL ? NULL : fopen(path, "r");
	if (f == NULL)
		return 0;
	if (fscanf(f, "%31s", word) != 1)
		word[0] = 0;
	fclose(f);
	return strcmp(word, name) == 0;
}

static void become(const char *name) {
	FILE *f = fopen(getenv("KLEIDI_TEST_FAULT"), "w");
	if (f == NULL)
		return;
	fputs(name, f);
	fclose(f);
}

// before comes before something is encrypted or decrypted.
static ulong_t before(ulong_t session) {
	while (fault("slow"))
		usleep(10000);
	if (fault("killed") || fault("killed-once"))
		((ulong_t(*)(ulong_t))real->function[close_session])(session);
	if (fault("killed-once"))
		become("");
	if (fault("removed"))
		become("gone");
	return fault("gone") ? ckr_device_removed : 0;
}

static int wrong(int more) {
	const char *path = getenv("KLEIDI_TEST_TRIES");
	if (path == NULL)
		return 0;
	int n = 0;
	FILE *f = fopen(path, "r");
	if (f != NULL) {
		if (fscanf(f, "%d", &n) != 1)
			n = 0;
		fclose(f);
	}
	if (more != 0 && (f = fopen(path, "w")) != NULL) {
		n = more < 0 ? 0 : n + more;
		fprintf(f, "%d\n", n);
		fclose(f);
	}
	return n;
}

static ulong_t own_get_token_info(ulong_t slot, token_info *info) {
	ulong_t rv = ((ulong_t(*)(ulong_t, token_info *))real->function[get_token_info])(slot, info);
	if (fault("gone"))
		return ckr_token_not_present;
	int n = wrong(0);
	info->flags &= ~(ulong_t)(user_pin_count_low | user_pin_final_try | user_pin_locked);
	if (n >= most())
		info->flags |= user_pin_locked;
	else if (n == most() - 1)
		info->flags |= user_pin_final_try | user_pin_count_low;
	else if (n > 0)
		info->flags |= user_pin_count_low;
	return rv;
}

static ulong_t own_login(ulong_t session, ulong_t user, unsigned char *pin, ulong_t size) {
	if (user == 1 && wrong(0) >= most())
		return ckr_pin_locked;
	if (user == 1 && fault("trouble"))
		return ckr_device_error;
	ulong_t rv = ((ulong_t(*)(ulong_t, ulong_t, unsigned char *, ulong_t))real->function[login])(session, user, pin, size);
	if (user == 1)
		wrong(rv == ckr_pin_incorrect ? 1 : -1);
	return rv;
}

static ulong_t own_encrypt_init(ulong_t session, mechanism *m, ulong_t key) {
	ulong_t rv = before(session);
	if (rv != 0)
		return rv;
	if (m->type == aes_gcm && getenv("KLEIDI_TEST_OWN_IV") != NULL) {
		gcm *p = m->parameter;
		for (ulong_t i = 0; i < p->iv_size; i++)
			if (p->iv[i] != 0)
				return ckr_mechanism_param_invalid;
		for (ulong_t i = 0; i < p->iv_size; i++)
			p->iv[i] = (unsigned char)(rand() | 1);
	}
	return ((ulong_t(*)(ulong_t, mechanism *, ulong_t))real->function[encrypt_init])(session, m, key);
}

static ulong_t own_decrypt_init(ulong_t session, mechanism *m, ulong_t key) {
	ulong_t rv = before(session);
	if (rv != 0)
		return rv;
	return ((ulong_t(*)(ulong_t, mechanism *, ulong_t))real->function[decrypt_init])(session, m, key);
}

ulong_t C_GetFunctionList(functions **list) {
	void *module = dlopen(getenv("KLEIDI_TEST_MODULE"), RTLD_NOW | RTLD_LOCAL);
	if (module == NULL)
		return 5;
	ulong_t rv = ((ulong_t(*)(functions **))dlsym(module, "C_GetFunctionList"))(&real);
	if (rv != 0)
		return rv;
	mine = *real;
	mine.function[get_token_info] = own_get_token_info;
	mine.function[login] = own_login;
	mine.function[encrypt_init] = own_encrypt_init;
	mine.function[decrypt_init] = own_decrypt_init;
	*list = &mine;
	return 0;
}
