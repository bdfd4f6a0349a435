//go:build e2e

package e2e

import (
	"errors"
	"testing"

	"github.com/anishathalye/porcupine"
)

// The checker must find what it is there for.
func TestTheModelOfAKey(t *testing.T) {
	commit := func(h *history, conn int, ordinal int32, offset, sent int64, err error) {
		h.commit("k", call{commit: true, offset: offset, conn: conn, ordinal: ordinal}, sent, err)
	}
	for name, c := range map[string]struct {
		happens func(h *history)
		want    porcupine.CheckResult
	}{
		"a commit is seen": {func(h *history) { commit(h, 1, 1, 5, h.now(), nil); h.fetch("k", call{}, h.now(), 5) }, porcupine.Ok},
		"a commit is lost": {func(h *history) { commit(h, 1, 1, 5, h.now(), nil); h.fetch("k", call{}, h.now(), -1) }, porcupine.Illegal},
		"an old one is read": {func(h *history) {
			commit(h, 1, 1, 5, h.now(), nil)
			commit(h, 2, 1, 6, h.now(), nil)
			h.fetch("k", call{}, h.now(), 5)
		}, porcupine.Illegal},
		"an unknown one is seen late": {func(h *history) {
			commit(h, 1, 1, 5, h.now(), errors.New("broken"))
			h.fetch("k", call{}, h.now(), -1)
			h.fetch("k", call{}, h.now(), 5)
		}, porcupine.Ok},
		"an unknown one comes and goes": {func(h *history) {
			commit(h, 1, 1, 5, h.now(), errors.New("broken"))
			h.fetch("k", call{}, h.now(), 5)
			h.fetch("k", call{}, h.now(), -1)
		}, porcupine.Illegal},
		"two on their way, the second stands": {func(h *history) {
			at := h.now()
			commit(h, 1, 1, 5, at, nil)
			commit(h, 1, 2, 6, at, nil)
			h.fetch("k", call{}, h.now(), 6)
		}, porcupine.Ok},
		"two on their way, the first stands": {func(h *history) {
			at := h.now()
			commit(h, 1, 1, 5, at, nil)
			commit(h, 1, 2, 6, at, nil)
			h.fetch("k", call{}, h.now(), 5)
		}, porcupine.Illegal},
		"the first is executed again": {func(h *history) {
			commit(h, 1, 1, 5, h.now(), nil)
			commit(h, 2, 1, 6, h.now(), nil)
			h.fetch("k", call{}, h.now(), 6)
			h.fetch("k", call{}, h.now(), 5)
		}, porcupine.Illegal},
	} {
		h := newHistory()
		c.happens(h)
		if got := porcupine.CheckOperationsTimeout(registerModel, h.key("k"), 0); got != c.want {
			t.Errorf("%s: %s", name, got)
		}
	}
}
