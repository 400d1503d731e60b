// Text of the stream in pieces becomes events.
import assert from 'node:assert/strict'
import { test } from 'node:test'

import { EventReader } from '../dist/esm/events.js'

function read(...pieces) {
  const events = []
  const reader = new EventReader()
  for (const piece of pieces) reader.read(piece, (event) => events.push(event))
  return events
}

const STREAM = ': hello\n\nevent: changed\nid: 1.2.3\ndata: {"tenant":"acme",\ndata: "key":"K"}\n\nevent:reset\ndata\n\n'
const EVENTS = [
  { type: 'comment', id: undefined, data: '' },
  { type: 'changed', id: '1.2.3', data: '{"tenant":"acme",\n"key":"K"}' },
  { type: 'reset', id: undefined, data: '' },
]

test('events are read wherever their text is cut, with any end of line', () => {
  for (const end of ['\n', '\r\n', '\r']) {
    const text = STREAM.replaceAll('\n', end) + (end === '\r' ? ': x' : '')
    assert.deepEqual(read(text), EVENTS)
    for (let at = 0; at <= text.length; at++) assert.deepEqual(read(text.slice(0, at), text.slice(at)), EVENTS, `${at}`)
    assert.deepEqual(read(...text), EVENTS)
  }
})

test('an id that could not go back in a header is none', () => {
  assert.equal(read('id: a\0b\nevent: changed\n\n')[0].id, undefined)
  assert.equal(read(`id: ${'9'.repeat(300)}\nevent: changed\n\n`)[0].id, undefined)
})

test('an unfinished event is none', () => {
  assert.deepEqual(read('event: changed\ndata: {}\n'), [])
})

test('a line without an end is given up', () => {
  assert.throws(() => read('data: ' + 'x'.repeat(70_000)))
})
