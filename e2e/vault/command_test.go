package vault

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"

	"github.com/hashicorp/vault/api"
)

// commandName is the name under which the test binary acts as the part of Vault's command
// line that docs/vault.md uses. The real command line takes a quarter of an hour to
// build.
const commandName = "vault"

// command runs `vault args` with the real API.
func command(args []string) error {
	client, err := api.NewClient(nil) // reads VAULT_ADDR, VAULT_CACERT and VAULT_TOKEN, like the real one
	if err != nil {
		return err
	}
	flags, words, err := split(args)
	if err != nil {
		return err
	}
	if ttl := flags["wrap-ttl"]; ttl != "" {
		client.SetWrappingLookupFunc(func(string, string) string { return ttl })
	}
	ctx := context.Background()
	secret, err := dispatch(ctx, client, flags, words)
	if err != nil {
		return err
	}
	return show(secret, flags["field"])
}

// split separates flags from words. Flags come before all key=value pairs.
func split(args []string) (flags map[string]string, words []string, err error) {
	known := map[string]bool{"f": true, "field": true, "wrap-ttl": true, "policy": true, "period": true, "no-default-policy": true}
	flags = map[string]string{}
	for _, arg := range args {
		flag, isFlag := strings.CutPrefix(arg, "-")
		if !isFlag {
			words = append(words, arg)
			continue
		}
		name, value, _ := strings.Cut(flag, "=")
		if !known[name] {
			return nil, nil, fmt.Errorf("flag %s", arg)
		}
		flags[name] = value
	}
	return flags, words, nil
}

func dispatch(ctx context.Context, client *api.Client, flags map[string]string, words []string) (*api.Secret, error) {
	switch all := strings.Join(words, " "); {
	case strings.HasPrefix(all, "secrets enable ") && len(words) == 3:
		return nil, client.Sys().MountWithContext(ctx, words[2], &api.MountInput{Type: words[2]})
	case strings.HasPrefix(all, "auth enable ") && len(words) == 3:
		return nil, client.Sys().EnableAuthWithOptionsWithContext(ctx, words[2], &api.EnableAuthOptions{Type: words[2]})
	case strings.HasPrefix(all, "policy write ") && len(words) == 4:
		b, err := os.ReadFile(words[3])
		if err != nil {
			return nil, err
		}
		return nil, client.Sys().PutPolicyWithContext(ctx, words[2], string(b))
	case all == "token create":
		return client.Auth().Token().CreateWithContext(ctx, &api.TokenCreateRequest{Policies: []string{flags["policy"]}, Period: flags["period"], NoDefaultPolicy: true})
	case strings.HasPrefix(all, "read ") && len(words) == 2:
		return client.Logical().ReadWithContext(ctx, words[1])
	case strings.HasPrefix(all, "write ") && len(words) > 1:
		data, err := pairs(words[2:])
		if err != nil {
			return nil, err
		}
		if _, force := flags["f"]; len(data) == 0 && !force {
			return nil, fmt.Errorf("write %s: no data, and no -f", words[1])
		}
		return client.Logical().WriteWithContext(ctx, words[1], data)
	}
	return nil, fmt.Errorf("vault %s: not a command of docs/vault.md", strings.Join(words, " "))
}

// pairs reads key=value and key=@file.
func pairs(words []string) (map[string]any, error) {
	data := map[string]any{}
	for _, word := range words {
		key, value, ok := strings.Cut(word, "=")
		if !ok {
			return nil, fmt.Errorf("%s is not key=value", word)
		}
		if file, isFile := strings.CutPrefix(value, "@"); isFile {
			b, err := os.ReadFile(file)
			if err != nil {
				return nil, err
			}
			value = string(b)
		}
		data[key] = value
	}
	return data, nil
}

func show(secret *api.Secret, name string) error {
	if secret == nil {
		fmt.Println("Success!")
		return nil
	}
	if name == "" {
		return json.NewEncoder(os.Stdout).Encode(secret.Data)
	}
	values := map[string]any{}
	for k, v := range secret.Data {
		values[k] = v
	}
	if secret.WrapInfo != nil {
		values["wrapping_token"] = secret.WrapInfo.Token
	}
	if secret.Auth != nil {
		values["token"] = secret.Auth.ClientToken
	}
	value, ok := values[name]
	if !ok {
		return fmt.Errorf("no field %s", name)
	}
	fmt.Print(value)
	return nil
}
