"""The objects in an answer (boxes, labels, masks, scores): parsed, drawn, printed and exported."""
