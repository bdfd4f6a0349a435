package store

import "testing"

func TestMemoryIsGivenBackTwiceAfterALoad(t *testing.T) {
	var c calm
	stored := int64(0)
	releases := func(seconds int, each int64) (at []int) {
		for i := range seconds {
			stored += each
			if c.tick(stored) {
				at = append(at, i+1)
			}
		}
		return at
	}
	if at := releases(100, busyBytes/10); at != nil {
		t.Fatal("without a load before", at)
	}
	if at := releases(100, busyBytes); at != nil {
		t.Fatal("under load", at)
	}
	if at := releases(3, 0); at != nil {
		t.Fatal("at once", at)
	}
	if at := releases(1, busyBytes); at != nil {
		t.Fatal("under load again", at)
	}
	if at := releases(100, busyBytes/10); len(at) != 2 || at[0] != calmFirst || at[1] != calmAndAgain {
		t.Fatal(at)
	}
}
