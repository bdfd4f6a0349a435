package store

const (
	busyBytes    = 128 << 10 // of raft's log in a second: some hundred commits
	calmFirst    = 5         // seconds after the last busy one
	calmAndAgain = 20        // badger's pool of table builders has let go of its last by then, one each 2 s
)

// calm knows when a load has ended. Badger's memtables and table builders are Go memory of some MiB each: after a
// burst five times what is alive, and without a collection, which only allocation brings about, it would stay.
type calm struct {
	seen  int64 // bytes ever stored, at the last tick
	quiet int   // ticks since the last busy one
	armed bool
}

// tick is called each second with the bytes ever stored, and says whether it is time to give memory back. After a
// load it says so twice; while nothing happens, never.
func (c *calm) tick(stored int64) bool {
	busy := stored-c.seen >= busyBytes
	c.seen = stored
	if busy {
		c.quiet, c.armed = 0, true
	}
	if busy || !c.armed {
		return false
	}
	c.quiet++
	c.armed = c.quiet < calmAndAgain
	return c.quiet == calmFirst || !c.armed
}
