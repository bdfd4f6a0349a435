package group

import (
	"iter"
	"slices"
)

// maxChunk bounds what is moved when something is put into a sorted list, or taken out.
const maxChunk = 256

// sorted is a list in the order of its elements' keys that is cheap to change at any place: one request, or the replay
// of its records, may put a hundred thousand offsets into it, from the last to the first. Most lists are short and are
// but a slice; a long one goes on in further chunks. None of those is empty, and head only if the list is.
type sorted[T any] struct {
	head []T
	rest *[][]T // nil: none
}

// place is where an element is, or would be: in the chunk before rest's first one (0) or in one of those.
type place struct{ chunk, index int }

func (l *sorted[T]) chunk(n int) *[]T {
	if n == 0 {
		return &l.head
	}
	return &(*l.rest)[n-1]
}

// search finds the element for which compare gives 0. compare is negative for those before it.
func (l *sorted[T]) search(compare func(*T) int) (p place, found bool) {
	if l.rest != nil { // the last chunk that begins at or before it
		i, equal := slices.BinarySearchFunc(*l.rest, 0, func(c []T, _ int) int { return compare(&c[0]) })
		if p.chunk = i; equal {
			p.chunk++
		}
	}
	list := *l.chunk(p.chunk)
	low, high := 0, len(list)
	for low < high {
		middle := int(uint(low+high) / 2)
		if compare(&list[middle]) < 0 {
			low = middle + 1
		} else {
			high = middle
		}
	}
	p.index = low
	return p, low < len(list) && compare(&list[low]) == 0
}

// at gives the element of a place. It holds until the list is changed.
func (l *sorted[T]) at(p place) *T { return &(*l.chunk(p.chunk))[p.index] }

func (l *sorted[T]) empty() bool { return len(l.head) == 0 }

func (l *sorted[T]) insert(p place, element T) {
	c := l.chunk(p.chunk)
	if *c = slices.Insert(*c, p.index, element); len(*c) <= maxChunk {
		return
	}
	cut := maxChunk / 2
	if p.index == maxChunk {
		cut = maxChunk // in order, as replay comes: chunks get full
	}
	second := slices.Clone((*c)[cut:])
	clear((*c)[cut:])
	*c = (*c)[:cut]
	if l.rest == nil {
		l.rest = &[][]T{}
	}
	*l.rest = slices.Insert(*l.rest, p.chunk, second)
}

func (l *sorted[T]) remove(p place) {
	c := l.chunk(p.chunk)
	if *c = slices.Delete(*c, p.index, p.index+1); len(*c) > 0 {
		return
	}
	switch {
	case p.chunk > 0:
		*l.rest = slices.Delete(*l.rest, p.chunk-1, p.chunk)
	case l.rest != nil:
		l.head = (*l.rest)[0]
		*l.rest = slices.Delete(*l.rest, 0, 1)
	}
	if l.rest != nil && len(*l.rest) == 0 {
		l.rest = nil
	}
}

// from gives the elements in order, beginning at a place. The list is not to be changed meanwhile.
func (l *sorted[T]) from(p place) iter.Seq[*T] {
	return func(yield func(*T) bool) {
		chunks := 1
		if l.rest != nil {
			chunks += len(*l.rest)
		}
		for ; p.chunk < chunks; p = (place{p.chunk + 1, 0}) {
			list := *l.chunk(p.chunk)
			for i := p.index; i < len(list); i++ {
				if !yield(&list[i]) {
					return
				}
			}
		}
	}
}

func (l *sorted[T]) all() iter.Seq[*T] { return l.from(place{}) }
