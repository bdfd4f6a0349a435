package main

import "testing"

// Addresses that validate takes: --listen without a host is on loopback, and its ports clash with no others there.
func TestListenOnLoopback(t *testing.T) {
	for _, listen := range []string{":0", ":19092", "127.0.0.2:19092", "[::1]:19092"} {
		code, _, stderr := call(t, nil, "config", "print", "--upstream", "127.0.0.3:19092", "--listen", listen, "--data-dir", t.TempDir())
		if code != 0 {
			t.Errorf("--listen %s: exit code %d, %s", listen, code, stderr)
		}
	}
}
