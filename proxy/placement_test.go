package proxy

import (
	"fmt"
	"slices"
	"testing"
)

// When a broker goes, only the groups that were on it move; and every broker has some.
func TestABrokersBounceMovesOnlyItsOwnGroups(t *testing.T) {
	nodes := []int32{0, 1, 2, 7, 1000}
	for _, gone := range nodes {
		rest := slices.DeleteFunc(slices.Clone(nodes), func(n int32) bool { return n == gone })
		had := 0
		for i := range 500 {
			name := fmt.Sprintf("group-%d", i)
			before, _ := place(name, nodes)
			after, ok := place(name, rest)
			if before == gone {
				had++
			} else if !ok || before != after {
				t.Fatalf("%s moved from %d to %d when %d went", name, before, after, gone)
			}
		}
		if had == 0 {
			t.Errorf("node %d has none of 500 groups", gone)
		}
	}
	if _, ok := place("g", nil); ok {
		t.Error("a group was placed on no broker")
	}
}

// The placement is part of what sidecars of different versions have to agree on.
func TestPlacementNeverChanges(t *testing.T) {
	var got []int32
	for _, name := range []string{"", "g", "payments", "console-consumer-1", "ünïcode"} {
		node, _ := place(name, []int32{1, 2, 3})
		got = append(got, node)
	}
	if want := []int32{2, 1, 1, 1, 3}; !slices.Equal(got, want) {
		t.Fatalf("%v, not %v", got, want)
	}
}
